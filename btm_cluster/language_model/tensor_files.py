"""Safetensors files that are read and written one tensor at a time: headers, and whole files.

Knows the format and nothing of models.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

METADATA = "__metadata__"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Header: TypeAlias = Mapping[str, Mapping[str, Any]]
"""By tensor name: `dtype`, `shape` and `data_offsets`. Under METADATA: notes on the whole file."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point types by their names in headers."""


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype, shape and place of each tensor."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return dict(json.loads(stream.read(length)))


def names_in_order(header: Header) -> list[str]:
    """The names of the tensors in the order in which they lie in the file."""
    return sorted((n for n in header if n != METADATA), key=lambda n: header[n]["data_offsets"][0])


def header_of(tensors: Header, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The header of a file that has these tensors alone, in this order; bytes as `data_offsets` has them."""
    found: dict[str, dict[str, Any]] = {METADATA: {"format": "pt"}}
    place = 0
    for name in names:
        size = size_of(tensors[name])
        found[name] = {**tensors[name], "data_offsets": [place, place + size]}
        place += size
    return found


def entry_of(dtype: str, shape: Sequence[int]) -> dict[str, Any]:
    """The entry of a tensor of this floating-point type and shape, for `header_of` to give a place."""
    size = math.prod(shape) * DTYPES[dtype].itemsize
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}


def size_of(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor by its entry in a header."""
    first, end = entry["data_offsets"]
    return int(end - first)


def write_tensors(header: Header, tensors: Iterable[torch.Tensor], target: Path) -> None:
    """Writes a file of this header; its tensors come in order, and one at a time is held."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
    size = max((entry["data_offsets"][1] for name, entry in header.items() if name != METADATA), default=0)
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            out.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        written = out.tell()
    assert written == 8 + len(encoded) + size, f"wrote {written} bytes, expected {8 + len(encoded) + size}"
