"""Tokenizers: trained on text or brought from elsewhere, kept as a Hugging Face folder."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from btm_cluster.errors import TextError, UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
    tokenizer.train_from_iterator(documents, trainer)
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


def import_tokenizer(source: str, folder: Path) -> int:
    """Saves the pretrained tokenizer at `source`, a local folder, below `folder`; returns its number of tokens.

    Raises:
        UserError: no fast tokenizer is there, or it has no end-of-text token.
    """
    try:
        fast = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise UserError(f"cannot load the tokenizer {source}", found=str(exc), expected="a tokenizer.json") from exc
    if not isinstance(fast, PreTrainedTokenizerFast) or fast.eos_token_id is None:
        raise UserError(
            f"the tokenizer {source} cannot be used",
            found=type(fast).__name__,
            expected="a fast tokenizer with an eos_token",
        )
    fast.save_pretrained(str(folder))
    return len(fast)


def load_tokenizer(files: Mapping[str, Path]) -> PreTrainedTokenizerFast:
    """The tokenizer in the stored files TOKENIZER_FILES, which need not lie in one folder."""
    config = json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8"))
    return PreTrainedTokenizerFast(tokenizer_file=str(files["tokenizer.json"]), eos_token=config["eos_token"])


def take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """The first documents, until they hold `characters` characters."""
    for text in documents:
        if characters <= 0:
            return
        yield text
        characters -= len(text)
