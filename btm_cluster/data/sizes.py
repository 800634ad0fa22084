"""Estimates of the tokens in files, by their sizes alone: before any is read."""

from collections.abc import Iterable, Sequence
from typing import Any

from btm_cluster.plan.kinds import codec, kind_of

BYTES_PER_TOKEN = 4.0
"""Bytes of text per token with a vocabulary of some tens of thousands; a smaller one makes more tokens."""
COMPRESSED = 3.0
"""Bytes of text in a byte of .gz, .zst or .bz2."""
PARQUET = 2.0
"""Bytes of text in a byte of Parquet, whose pages are compressed as a rule."""


def estimated_tokens(files: Iterable[Sequence[Any]]) -> int:
    """Tokens in files, each given as its path and size first, as a source's fingerprint has them."""
    return round(sum(text_bytes(str(path), int(size)) for path, size, *_ in files) / BYTES_PER_TOKEN)


def text_bytes(path: str, size_bytes: int) -> float:
    """Bytes of text in a file, about; what stands beside the text in its rows counts as text."""
    kind = kind_of(path)
    if kind == "unread":
        return 0.0
    if kind == "Parquet":
        return size_bytes * PARQUET
    return size_bytes * (COMPRESSED if codec(path) else 1.0)
