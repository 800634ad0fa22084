"""Tokenizers: trained on text or brought from elsewhere, kept as a Hugging Face folder."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from btm_cluster.errors import TextError, UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_LONGEST_RUN = 1000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_RUN + 1},}}|(?<!\s)\s{{{_LONGEST_RUN + 1},}}")


def train_tokenizer(documents: Iterable[str], vocabulary: int, folder: Path) -> int:
    """Trains a byte-level BPE and saves it; returns its number of tokens. Independent of document order and threads.

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
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(str(folder))
    return found


def _cut_long_runs(documents: Iterable[str]) -> Iterator[str]:
    """The documents, cut within long runs without (or of) white space: a run of n takes the trainer n² steps."""
    for text in documents:
        rest = 0
        for run in _LONG_RUN.finditer(text):
            yield text[rest : run.start()]
            yield from (text[i : i + _LONGEST_RUN] for i in range(run.start(), run.end(), _LONGEST_RUN))
            rest = run.end()
        yield text[rest:]


def import_tokenizer(source: str, folder: Path) -> int:
    """Saves the pretrained tokenizer at `source`, a local folder, below `folder`; returns its number of tokens.

    Raises:
        UserError: no fast tokenizer is there, or it has no end-of-text token.
    """
    fast = open_pretrained_tokenizer(source)
    fast.save_pretrained(str(folder))
    return len(fast)


def open_pretrained_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """The pretrained tokenizer at `source`, a local folder.

    Raises:
        UserError: no fast tokenizer is there, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer  # and torch with it, which reading and tokenising can do without

    try:
        fast = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as exc:  # from OSError to the bare Exception that the Rust reader raises
        raise UserError(
            f"cannot load the tokenizer {source}",
            found=" ".join(f"{exc}".split())[:300] or type(exc).__name__,
            expected="a folder with a tokenizer.json that transformers opens without code of its own",
            remedy="save the tokenizer there with save_pretrained",
        ) from exc
    if not isinstance(fast, PreTrainedTokenizerFast) or fast.eos_token_id is None:
        raise UserError(
            f"the tokenizer {source} cannot be used",
            found=f"{type(fast).__name__}, eos_token {fast.eos_token}",
            expected="a fast tokenizer with an eos_token among its tokens",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    return fast


def load_tokenizer(files: Mapping[str, Path]) -> PreTrainedTokenizerFast:
    """The tokenizer in the stored files TOKENIZER_FILES, which need not lie in one folder."""
    config = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8"))
    file, end = str(files["tokenizer.json"]), config["eos_token"]
    # A document that spells <|endoftext|> has not ended.
    fast = PreTrainedTokenizerFast(tokenizer_file=file, eos_token=end, split_special_tokens=True)
    fast.backend_tokenizer.encode_special_tokens = True
    return fast


def take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents, until they hold `characters` characters."""
    for text in documents:
        if characters <= 0:
            return
        yield text
        characters -= len(text)
