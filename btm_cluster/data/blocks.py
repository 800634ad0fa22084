"""Token blocks: documents packed without padding into rows of `block_tokens`, and
the order in which training takes them.

Every document ends with the end-of-text token. Training drops what does not fill a block; held-out splits
keep it, padded, so that every token counts. A model reads a block after the tokenizer's first token and
predicts all of it, but for tokens that are marked as read alone: a token that begins documents, and what the
assistant does not say in a conversation.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from btm_cluster.data.tokenizer import TextTokenizer

PADDING_DOCUMENT = -1
MARKS_FILE = "marks.npy"
READ, TEXT, END = 0, 1, 2
"""Marks of a token: read alone; predicted; predicted and no text, as the end of a document or a turn."""


@dataclass(frozen=True)
class TokenisedDocument:
    """A document's tokens, with its end."""

    ids: Sequence[int]
    marks: np.ndarray | None
    """The mark of each token, uint8. None: all are predicted, and the last one is no text."""
    text_bytes: int
    """Bytes of the text that is predicted, in UTF-8."""


@dataclass(frozen=True)
class PackedBlocks:
    """Documents in blocks."""

    tokens: np.ndarray
    """[blocks, block_tokens] in the smallest unsigned type."""
    documents: np.ndarray
    """Each token's document, int32, PADDING_DOCUMENT for padding."""
    marks: np.ndarray | None
    """Each token's mark, uint8, READ for padding. None: all but padding are predicted, and each document's last
    one is no text."""
    bytes_of_documents: np.ndarray
    """Bytes of each document's text that is predicted, int64."""


def tokenised(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterable[TokenisedDocument]:
    """Documents of plain text as tokens, which are all predicted."""
    sizes: list[int] = []

    def measured() -> Iterable[str]:
        for document in documents:
            sizes.append(len(document.encode()))
            yield document

    for number, ids in enumerate(tokenizer.encode_all(measured())):
        ids.append(tokenizer.end_of_text)
        yield TokenisedDocument(ids, None, sizes[number])


def pack_blocks(
    documents: Iterable[TokenisedDocument],
    tokenizer: TextTokenizer,
    block_tokens: int,
    keep_rest: bool,
    keep_marks: bool = False,
) -> PackedBlocks:
    """Documents one after the other.

    By a tokenizer that begins documents with a token, each has it before it, except at the beginning of a
    block, which is read after it anyway. There are marks by such a tokenizer, and where they are asked for.
    """
    dtype = np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32
    keep_marks |= tokenizer.begins_documents
    pieces: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    sizes: list[int] = []
    length = 0
    for document in documents:
        ids = np.array(document.ids, dtype=dtype)
        if keep_marks:
            own = document.marks if document.marks is not None else _marks_of_text(len(ids))
            begins = _begins(document, tokenizer, length % block_tokens == 0)
            ids, own = _begun(ids, own, tokenizer.first_token, begins)
            marks.append(own)
        pieces.append(ids)
        sizes.append(document.text_bytes)
        length += len(ids)
    owners = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
    missing = -length % block_tokens if keep_rest else 0
    kept = length + missing - (length + missing) % block_tokens

    def blocks(parts: Sequence[np.ndarray], padding: int, kind: type[np.generic]) -> np.ndarray:
        whole = np.concatenate([*parts, np.full(missing, padding, dtype=kind)], dtype=kind)
        return whole[:kept].reshape(-1, block_tokens)

    return PackedBlocks(
        blocks(pieces, tokenizer.end_of_text, dtype),
        blocks([owners], PADDING_DOCUMENT, np.int32),
        blocks(marks, READ, np.uint8) if keep_marks else None,
        np.array(sizes, dtype=np.int64),
    )


def _marks_of_text(length: int) -> np.ndarray:
    marks = np.full(length, TEXT, dtype=np.uint8)
    marks[-1] = END
    return marks


def _begins(document: TokenisedDocument, tokenizer: TextTokenizer, at_block: bool) -> int:
    """How many first tokens a document gets before it: 1, 0, or -1 for one too many.

    A conversation begins as its template says. A block is read after the first token anyway.
    """
    if not tokenizer.begins_documents:
        return 0
    has_one = document.marks is not None and bool(document.ids) and document.ids[0] == tokenizer.first_token
    if at_block:
        return -1 if has_one else 0
    return 1 if document.marks is None else 0


def _begun(
    ids: np.ndarray, marks: np.ndarray, first_token: int, begins: int
) -> tuple[np.ndarray, np.ndarray]:
    if begins < 0:
        return ids[1:], marks[1:]
    return (np.insert(ids, 0, first_token), np.insert(marks, 0, READ)) if begins else (ids, marks)


class Blocks:
    """The blocks of several shard files, or the first of them, as one memory-mapped
    array: int64 [n, block_tokens] by indices."""

    def __init__(self, files: Sequence[Path], first: int | None = None) -> None:
        self._first = first
        self._shards = [shard for shard in (np.load(file, mmap_mode="r") for file in files) if len(shard)]
        self._ends = np.cumsum([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        held = int(self._ends[-1]) if len(self._ends) else 0
        return held if self._first is None else min(held, self._first)

    @property
    def block_tokens(self) -> int:
        """Tokens of each block; there must be one."""
        return int(self._shards[0].shape[1])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Blocks at `indices` [n], as int64 [n, block_tokens]."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        taken = np.empty((len(indices), self.block_tokens), dtype=np.int64)
        for row, (s, i) in enumerate(zip(shards, indices, strict=True)):
            taken[row] = self._shards[s][i - starts[s]]
        return taken


def block_order(seed: int, text: str, blocks: int, first: int, count: int) -> np.ndarray:
    """Indices of the blocks that training takes at positions first …
    first+count-1 of its endless pass over a text.

    Each epoch is a fresh permutation, a pure function of (seed, text, epoch), so that resuming costs nothing.
    """
    positions = np.arange(first, first + count)
    epochs, offsets = positions // blocks, positions % blocks
    return np.array(
        [_permutation(seed, text, blocks, int(e))[o] for e, o in zip(epochs, offsets, strict=True)]
    )


@lru_cache(maxsize=512)  # two epochs of more domains than a forest is likely to have
def _permutation(seed: int, text: str, blocks: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}/{text}/{epoch}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).permutation(blocks)
