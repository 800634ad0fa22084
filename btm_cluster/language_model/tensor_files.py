"""Safetensors files that are read and written one tensor at a time: headers, and whole files.

Knows the format and nothing of models.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Self, TypeAlias

import torch

METADATA = "__metadata__"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPTIMIZER_FILE = "optimizer.safetensors"
"""Moments and what else an optimizer goes on from, beside a model's weights."""
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a header, in the order in which safetensors puts tensors into a file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Header: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By tensor name: `dtype`, `shape` and `data_offsets`. Under METADATA: notes on the whole file."""


def holds_weights(file: str) -> bool:
    """Whether a stored model's file, by its name, holds weights or what changed of them."""
    return file.endswith(".safetensors") and file != OPTIMIZER_FILE


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype, shape and place of each tensor."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return dict(json.loads(stream.read(length)))


def names_in_order(header: Header) -> list[str]:
    """The names of the tensors in the order in which they lie in the file."""
    return sorted((n for n in header if n != METADATA), key=lambda n: header[n]["data_offsets"][0])


def header_of(tensors: Header, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The header of a file that has these tensors alone, in this order; of each, dtype and shape count."""
    found: dict[str, dict[str, Any]] = {METADATA: {"format": "pt"}}
    place = 0
    for name in names:
        size = size_of(tensors[name])
        found[name] = {**tensors[name], "data_offsets": [place, place + size]}
        place += size
    return found


def layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """The header of a file with these tensors, as safetensors orders them; they need no values."""
    return ordered({name: {"dtype": _NAMES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()})


def ordered(tensors: Header) -> dict[str, dict[str, Any]]:
    """The header of a file with tensors of these dtypes and shapes, as safetensors orders them."""
    order = list(DTYPES)
    return header_of(tensors, sorted(tensors, key=lambda name: (order.index(tensors[name]["dtype"]), name)))


def size_of(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor by its entry in a header."""
    shape: list[int] = entry["shape"]
    return math.prod(shape) * DTYPES[entry["dtype"]].itemsize


def check_shape(header: Header, name: str, tensor: torch.Tensor) -> None:
    """Stops where a tensor has another shape than its header says, which is an error of ours."""
    expected = header[name]["shape"]
    assert list(tensor.shape) == expected, f"{name}: {list(tensor.shape)}, not {expected}"


class TensorWriter:
    """A file in the making: its tensors come in any order, whole or in parts and from any thread, and none is held."""

    def __init__(self, header: Header, target: Path) -> None:
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
        self._header, self._lock = header, Lock()
        self._missing = {name: size_of(header[name]) for name in names_in_order(header)}
        self._first_byte = 8 + len(encoded)
        self._out = target.open("wb", buffering=0)
        try:
            self._write_at(0, memoryview(struct.pack("<Q", len(encoded)) + encoded))
        except OSError:
            self._out.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor from whatever device, in the dtype that the header says."""
        check_shape(self._header, name, tensor)
        self.write_part(name, 0, tensor)

    def write_part(self, name: str, first: int, part: torch.Tensor) -> None:
        """Writes the tensor's elements from `first` on, in order; each element is to be written once."""
        entry = self._header[name]
        stored = part.detach().to("cpu", DTYPES[entry["dtype"]]).reshape(-1).view(torch.uint8)
        place = self._first_byte + entry["data_offsets"][0] + first * DTYPES[entry["dtype"]].itemsize
        self._write_at(place, stored.numpy().data)
        with self._lock:
            self._missing[name] -= len(stored)

    def _write_at(self, place: int, data: memoryview) -> None:
        while len(data):  # the system writes 2 GiB at most at once
            written = os.pwrite(self._out.fileno(), data, place)
            place, data = place + written, data[written:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._out.close()
        missing = [name for name, left in self._missing.items() if left]
        assert failed or not missing, f"not written: {missing[:3]}"


def write_tensors(header: Header, tensors: Iterable[tuple[str, torch.Tensor]], target: Path) -> None:
    """Writes a file of this header; its tensors come by name, in any order, and one at a time is held."""
    with TensorWriter(header, target) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)
