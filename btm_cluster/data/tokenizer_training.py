"""A tokenizer trained on text."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from btm_cluster.data.tokenizer import END_OF_TEXT, TRAINED_SPECIAL_TOKENS, write_config
from btm_cluster.errors import TextError

_LONGEST_RUN = 1000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_RUN + 1},}}|(?<!\s)\s{{{_LONGEST_RUN + 1},}}")


def train_tokenizer(documents: Iterable[str], vocabulary: int, folder: Path) -> int:
    """Trains a byte-level BPE and saves it; returns its number of tokens.

    Independent of document order and threads.

    Raises:
        TextError: the text is too small for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_cut_long_runs(documents), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise TextError(
            "the training text is too small for the vocabulary",
            found=f"{found} tokens",
            expected=f"tokenizer.train.vocabulary = {vocabulary}",
            remedy=f"give more text, or set the vocabulary to {found} or less",
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(dict(TRAINED_SPECIAL_TOKENS), folder)
    return found


def _cut_long_runs(documents: Iterable[str]) -> Iterator[str]:
    """The documents, cut within long runs without (or of) white space: a run
    of n takes the trainer n² steps."""
    for text in documents:
        rest = 0
        for run in _LONG_RUN.finditer(text):
            yield text[rest : run.start()]
            yield from (text[i : i + _LONGEST_RUN] for i in range(run.start(), run.end(), _LONGEST_RUN))
            rest = run.end()
        yield text[rest:]


def take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents, until they hold `characters` characters."""
    for text in documents:
        if characters <= 0:
            return
        yield text
        characters -= len(text)
