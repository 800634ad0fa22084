"""Averages stored models into one safetensors file, holding one tensor of each at a time."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from btm_cluster.equations.averaging import average_tensor
from btm_cluster.errors import IncompatibleError


def average_files(files: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Writes Σ w_i θ_i of the models in `files` to `target`.

    Memory: one tensor, whatever the number of models.

    Raises:
        IncompatibleError: tensors of other names or shapes, checked from the headers before any weight is
            read; or whole numbers that differ.
    """
    header, size = _common_header(files)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns data to 8 bytes
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    with target.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        opened = [safe_open(file, framework="pt") for file in files]
        for name in names:
            tensors = [model.get_tensor(name) for model in opened]  # type: ignore[no-untyped-call]
            try:
                average = average_tensor(tensors, weights)
            except ValueError as exc:
                raise IncompatibleError(
                    f"{files[0]} and {len(files) - 1} others cannot be averaged",
                    found=f"{name}: {exc}",
                    expected="floating-point tensors, or the same values in all",
                    remedy="ensemble these models instead",
                ) from exc
            out.write(average.reshape(-1).view(torch.uint8).numpy().tobytes())
        written = out.tell()
    assert written == 8 + len(encoded) + size, f"wrote {written} bytes, expected {8 + len(encoded) + size}"


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: dtype, shape and place of each tensor."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return dict(json.loads(stream.read(length)))


def _common_header(files: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], int]:
    headers = [read_header(file) for file in files]
    shapes = [
        {name: (t["dtype"], t["shape"]) for name, t in h.items() if name != "__metadata__"} for h in headers
    ]
    for file, other in zip(files[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            name = next(n for n in sorted({*shapes[0], *other}) if shapes[0].get(n) != other.get(n))
            raise IncompatibleError(
                f"{file} cannot be averaged with {files[0]}",
                found=f"{name}: {other.get(name)}",
                expected=f"{name}: {shapes[0].get(name)}",
                remedy="average only models of one architecture",
            )
    size = max(int(t["data_offsets"][1]) for n, t in headers[0].items() if n != "__metadata__")
    return headers[0], size
