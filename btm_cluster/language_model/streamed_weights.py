"""Weights that are read in order of their bytes, a piece at a time, from wherever the bytes are.

Knows safetensors, and nothing of stores.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from btm_cluster.language_model.stored_weights import ReadInPieces, StoredWeights
from btm_cluster.language_model.tensor_files import DTYPES, Header, header_of, names_in_order, size_of


class ByteSource(Protocol):
    """A file that is read from its beginning to its end, with few steps back."""

    def pieces(self, start: int, size: int, alone: bool = False) -> Iterator[memoryview]:
        """The bytes from `start` on, `size` of them, in order; pieces begin at multiples of 8, but for the first.

        `alone`, nothing is read ahead of them.
        """

    def drop(self) -> None:
        """Holds nothing of the file until it is read again."""


class StreamedWeights:
    """The tensors of safetensors files, whose bytes come from `sources`; `called` so in errors."""

    def __init__(self, sources: Sequence[ByteSource], called: str) -> None:
        self._called = called
        self._places: dict[str, tuple[ByteSource, int]] = {}
        entries: dict[str, Mapping[str, object]] = {}
        for source in sources:
            first_byte, header = _read_header(source)
            for name in names_in_order(header):
                self._places[name] = (source, first_byte + header[name]["data_offsets"][0])
                entries[name] = header[name]
        self._header = header_of(entries, entries)

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        entry = self._header[name]
        source, start = self._places[name]
        data = bytearray().join(source.pieces(start, size_of(entry)))
        return _elements(data, entry["dtype"]).reshape(entry["shape"]).to(device)

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        dtype = self._header[name]["dtype"]
        width = DTYPES[dtype].itemsize
        source, start = self._places[name]
        pieces = source.pieces(start + first * width, count * width)
        if start % width:  # an element may lie in two pieces
            pieces = iter([memoryview(bytearray().join(pieces))])
        for piece in pieces:
            yield _elements(piece, dtype)

    def __str__(self) -> str:
        return self._called


class HeldTensor:
    """Weights read in pieces from whole tensors, of which the last one read is held."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights = weights
        self._name, self._tensor = "", torch.empty(0)

    @property
    def header(self) -> Header:
        return self._weights.header

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        if name != self._name:
            self._name, self._tensor = name, self._weights.read(name).reshape(-1)
        yield self._tensor[first : first + count]


def in_pieces(weights: StoredWeights) -> ReadInPieces:
    """The same weights, read in pieces."""
    return weights if isinstance(weights, ReadInPieces) else HeldTensor(weights)


def _read_header(source: ByteSource) -> tuple[int, Header]:
    """Where data begin, and what the header says."""
    # A model may have many files, of which one is read at a time: the others hold nothing.
    (length,) = struct.unpack("<Q", b"".join(source.pieces(0, 8, alone=True)))
    header = json.loads(b"".join(source.pieces(8, length, alone=True)))
    source.drop()
    return 8 + length, header


def _elements(data: memoryview | bytearray, dtype: str) -> torch.Tensor:
    return torch.frombuffer(data, dtype=DTYPES[dtype]) if len(data) else torch.empty(0, dtype=DTYPES[dtype])
