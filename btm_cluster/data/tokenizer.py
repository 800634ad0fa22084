"""Tokenizers, kept as a Hugging Face folder: opened, brought from elsewhere, and what they make of text."""

import json
import logging
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from btm_cluster.data.pieces import DocumentEncoder
from btm_cluster.errors import UserError, one_line
from btm_cluster.plan import ChatTemplate

log = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
TRAINED_SPECIAL_TOKENS = (("bos_token", END_OF_TEXT), ("eos_token", END_OF_TEXT))
"""Special tokens of a tokenizer that is trained here, by name."""
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", TOKENIZER_CONFIG)
CHAT_TEMPLATE = "chat_template.jinja"
MORE_FILES = (
    CHAT_TEMPLATE,
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Kept with an imported tokenizer where they came with it, for whoever opens a merged model.

The vocabulary and merges of older formats are not: tokenizer.json has them."""
MORE_CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
"""Beside the one in chat_template.jinja; named, they fit into tokenizer_config.json too."""
_PROBE = (
    "The 12 ships, 3.14 and 1,987,654 tons: it's  two  spaces,\ttab\n\n    def f(x):\r\n        return x_1 "
    "!= 'é'\n"
    "Ünïcödé ﬁ ①, Привет мир, 你好世界, שלום, 🙂👍🏽 …—«» don't we'll I'VE\n"
)
"""Text on which tokenizers differ: digits, runs of spaces, line ends,
contractions, other scripts, ligatures, emoji."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer.json, used bare: its settings (truncation, padding, dropout) have no effect."""

    backend: Tokenizer
    end_of_text: int
    """Id of the token that ends every document."""
    first_token: int
    """Id of the token that a model reads before every block: the tokenizer's own
    first token, or that of end of text."""
    special_tokens_by_name: tuple[tuple[str, str], ...] = ()
    """Such as `bos_token`, as chat templates call them; of a pretrained tokenizer."""
    chat_template: ChatTemplate | None = None
    """A pretrained tokenizer's own."""

    @property
    def begins_documents(self) -> bool:
        """Whether documents begin with a token that is not the one that ends them, such as `<bos>`."""
        return self.first_token != self.end_of_text

    @property
    def vocabulary(self) -> int:
        """One more than the largest id, which need not be the number of tokens."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def name(self, token: int) -> str:
        """A token as its tokenizer.json spells it."""
        return str(self.backend.id_to_token(token))

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_all(self, documents: Iterable[str]) -> "Iterator[array[int]]":
        """Ids of each document alone, uint32."""
        return self._encoder.encode(documents)

    @cached_property
    def _encoder(self) -> DocumentEncoder:
        return DocumentEncoder(self.backend)

    def encode_rendered(self, texts: Sequence[str]) -> list[Encoding]:
        """Tokens of texts that a chat template wrote, in which special tokens are what they spell."""
        encodings: list[Encoding] = self._for_rendered.encode_batch(list(texts), add_special_tokens=False)
        return encodings

    @cached_property
    def _for_rendered(self) -> Tokenizer:
        # As text it does not say that special tokens are to be spelled.
        return Tokenizer.from_str(self.backend.to_str())

    def special_tokens(self) -> frozenset[int]:
        """Ids of tokens that are no text."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones spelled out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to `before`: decoded apart from it, they would lose the
        space or half a character at the seam."""
        first, whole = self.decode(before), self.decode([*before, *ids])
        return whole[len(first) :] if whole.startswith(first) else self.decode(ids)


def load_tokenizer(files: Mapping[str, Path], first_token: int | None = None) -> TextTokenizer:
    """The tokenizer in the stored files TOKENIZER_FILES, which need not lie in one folder.

    Without a first token: end of text.
    """
    config = json.loads(files[TOKENIZER_CONFIG].read_text(encoding="utf-8"))
    backend = _bare(Tokenizer.from_file(str(files["tokenizer.json"])))
    end = backend.token_to_id(_content(config["eos_token"]))
    assert end is not None, "a stored tokenizer has its end-of-text token"
    return TextTokenizer(backend, end, end if first_token is None else first_token)


def open_pretrained_tokenizer(source: Path, first_token: str | None = None) -> TextTokenizer:
    """The pretrained tokenizer in the folder `source`: its tokenizer.json, or
    what transformers converts to one.

    `first_token` is what every block is read after; without one, it is what transformers puts before a text
    by this tokenizer, or else end of text.

    Raises:
        UserError: no fast tokenizer is there, it has no end-of-text token, or its first token cannot be told.
    """
    auto = _open_by_transformers(source)
    own = source / "tokenizer.json"
    backend = _bare(
        _read_backend(own) if own.is_file() else Tokenizer.from_str(auto.backend_tokenizer.to_str())
    )
    end = None if auto.eos_token is None else backend.token_to_id(auto.eos_token)
    if end is None:
        raise UserError(
            f"the tokenizer {source} cannot be used",
            found=f"eos_token {auto.eos_token}",
            expected="an eos_token among its tokens",
            remedy="set `eos_token` in its tokenizer_config.json",
        )
    first = _first_token(source, auto, backend, end, first_token)
    named = tuple((name, token) for name, token in auto.special_tokens_map.items() if isinstance(token, str))
    tokenizer = TextTokenizer(backend, end, first, named, _chat_template(source, auto, named))
    _compare(source, auto, tokenizer)
    return tokenizer


def _chat_template(
    source: Path, auto: Any, special_tokens: tuple[tuple[str, str], ...]
) -> ChatTemplate | None:
    try:
        template = auto.get_chat_template()
    except ValueError:  # it has none, or several of which none is the default
        return None
    return ChatTemplate(template, special_tokens, f"the chat template of the tokenizer {source}")


def compare_with_transformers(folder: Path, tokenizer: TextTokenizer) -> None:
    """Warns where AutoTokenizer would give other ids for a text than the folder's
    tokenizer.json, which is `tokenizer`."""
    _compare(folder, _open_by_transformers(folder), tokenizer)


def _compare(folder: Path, auto: Any, tokenizer: TextTokenizer) -> None:
    # Not verbose: it would warn that the probe is longer than a block.
    if auto.encode(_PROBE, add_special_tokens=False, verbose=False) != tokenizer.encode(_PROBE):
        log.warning(
            "%s: AutoTokenizer builds a %s anew, which gives other token ids than the tokenizer.json that is "
            "used here; open it with PreTrainedTokenizerFast(tokenizer_file=…)",
            folder,
            type(auto).__name__,
        )


def import_tokenizer(source: Path, tokenizer: TextTokenizer, folder: Path) -> dict[str, Path]:
    """Copies the files of a pretrained tokenizer, opened as `tokenizer`,
    below `folder`; returns them by name.

    tokenizer.json stays as it is, byte for byte. tokenizer_config.json names the class that opens it as it
    is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (source / "tokenizer.json").is_file():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    else:
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    config = source / TOKENIZER_CONFIG
    given = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    given.pop("auto_map", None)
    kept = [name for name in MORE_FILES if (source / name).is_file()]
    if more := sorted(source.glob(MORE_CHAT_TEMPLATES)):
        named = {"default": source / kept.pop(0)} if CHAT_TEMPLATE in kept else {}
        named |= {file.stem: file for file in more}
        given["chat_template"] = [
            {"name": n, "template": f.read_text(encoding="utf-8")} for n, f in named.items()
        ]
    write_config({"eos_token": tokenizer.name(tokenizer.end_of_text)} | given, folder)
    for name in kept:
        shutil.copyfile(source / name, folder / name)
    return {name: folder / name for name in (*TOKENIZER_FILES, *kept)}


def write_config(fields: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer_config.json below `folder`."""
    # A named class such as Qwen2Tokenizer is rebuilt by transformers 5 with the class's own rules; this one
    # opens the file.
    whole = {**fields, "tokenizer_class": "PreTrainedTokenizerFast"}
    text = json.dumps(whole, indent=2, ensure_ascii=False, sort_keys=True)
    (folder / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _open_by_transformers(source: Path) -> Any:
    from transformers import (  # and torch with it, which tokenising can do without
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )

    try:
        auto = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as exc:  # from OSError to the bare Exception that the Rust reader raises
        raise _unreadable(source, exc) from exc
    if not isinstance(auto, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer {source} cannot be used",
            found=type(auto).__name__,
            expected="a fast tokenizer, one with a tokenizer.json",
            remedy="convert it with transformers, and save it with save_pretrained",
        )
    _without_dropout(auto.backend_tokenizer)
    return auto


def _read_backend(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as exc:  # the Rust reader's own
        raise _unreadable(file.parent, exc) from exc


def _unreadable(source: Path, exc: Exception) -> UserError:
    return UserError(
        f"cannot load the tokenizer {source}",
        found=one_line(exc),
        expected="a folder with a tokenizer.json that transformers opens without code of its own",
        remedy="save the tokenizer there with save_pretrained",
    )


def _bare(backend: Tokenizer) -> Tokenizer:
    """Without what its file may say beside the vocabulary.

    A document that spells <|endoftext|> has not ended.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    _without_dropout(backend)
    return backend


def _without_dropout(backend: Tokenizer) -> None:
    if getattr(backend.model, "dropout", None) is not None:
        backend.model.dropout = None


def _first_token(source: Path, auto: Any, backend: Tokenizer, end: int, given: str | None) -> int:
    remedy = "name one of its tokens as `tokenizer.first_token` in the plan"
    if given is not None:
        found = backend.token_to_id(given)
        if found is None:
            raise UserError(f"the tokenizer {source} has no token {given!r}", remedy=remedy)
        return int(found)
    alone = auto.encode(_PROBE, add_special_tokens=False, verbose=False)
    whole = auto.encode(_PROBE, verbose=False)
    before = next(
        (whole[:n] for n in range(len(whole) - len(alone) + 1) if whole[n : n + len(alone)] == alone), None
    )
    if before is None or len(before) > 1:
        raise UserError(
            f"the tokenizer {source} does not say which token a model reads first",
            found="no token"
            if before is None
            else f"{len(before)} tokens: {auto.convert_ids_to_tokens(before)}",
            expected="at most one token before a text",
            remedy=remedy,
        )
    return int(before[0]) if before else end


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
