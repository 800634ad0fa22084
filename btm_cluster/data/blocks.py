"""Token blocks: documents packed without padding into rows of `block_tokens`, and
the order in which training takes them.

Every document ends with the end-of-text token. Training drops what does not fill a block; held-out splits
keep it, padded, so that every token counts. A model reads a block after the tokenizer's first token and
predicts all of it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from btm_cluster.data.tokenizer import TextTokenizer

PADDING_DOCUMENT = -1


def pack_blocks(
    documents: Iterable[str], tokenizer: TextTokenizer, block_tokens: int, keep_rest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [blocks, block_tokens] in the smallest unsigned type, and each token's
    document number, int32, -1 for padding."""
    dtype = np.uint16 if tokenizer.vocabulary <= 2**16 else np.uint32
    end = tokenizer.end_of_text
    pieces = [np.array([*ids, end], dtype=dtype) for ids in tokenizer.encode_all(documents)]
    lengths = [len(piece) for piece in pieces]
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, dtype=dtype)
    owners = np.repeat(np.arange(len(pieces), dtype=np.int32), lengths)
    rest = len(tokens) % block_tokens
    if rest and keep_rest:
        missing = block_tokens - rest
        tokens = np.concatenate([tokens, np.full(missing, end, dtype=dtype)])
        owners = np.concatenate([owners, np.full(missing, PADDING_DOCUMENT, dtype=np.int32)])
    elif rest:
        tokens, owners = tokens[:-rest], owners[:-rest]
    return tokens.reshape(-1, block_tokens), owners.reshape(-1, block_tokens)


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

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Blocks at `indices` [n], as int64 [n, block_tokens]."""
        shards = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        taken = np.empty((len(indices), self._shards[0].shape[1]), dtype=np.int64)
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
