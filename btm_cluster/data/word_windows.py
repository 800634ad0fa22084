"""Runs of words in a document, as hashes: by them it is counted what texts have in common."""

import hashlib
from functools import lru_cache

import numpy as np


def word_windows(text: str, words: int = 20) -> np.ndarray:
    """A 64-bit hash of every run of `words` words: uint64 [max(0, number of words - words + 1)]."""
    hashes = np.array([_word_hash(word) for word in text.casefold().split()], dtype=np.uint64)
    if len(hashes) < words:
        return np.zeros(0, dtype=np.uint64)
    # A polynomial in an odd number, modulo 2^64.
    windows = np.zeros(len(hashes) - words + 1, dtype=np.uint64)
    for offset in range(words):
        windows = windows * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + len(windows)]
    return windows


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
