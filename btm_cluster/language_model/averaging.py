"""Merges stored models into one safetensors file, holding one tensor of each at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open

from btm_cluster.equations.averaging import average_tensor
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.tensor_files import (
    METADATA,
    Header,
    names_in_order,
    read_header,
    write_tensors,
)

Method: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes one tensor of one of each model, all of one shape.

Raises ValueError where that cannot be.
"""


def average_files(files: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Writes Σ w_i θ_i of the models in `files` to `target`, as `merge_files` does."""
    merge_files(files, partial(average_tensor, weights=weights), target)


def merge_files(
    files: Sequence[Path], method: Method, target: Path, count: Callable[[int], None] = lambda _: None
) -> None:
    """Writes what `method` makes of the models in `files`, tensor by tensor, to `target`.

    Memory: a few tensors, whatever the number of models' tensors. `count` is told of each that is made.

    Raises:
        IncompatibleError: tensors of other names or shapes, checked from the headers before any weight is
            read; or whole numbers that differ.
    """
    header = _common_header(files)
    write_tensors(header, _merged(files, names_in_order(header), method, count), target)


def _merged(
    files: Sequence[Path], names: Sequence[str], method: Method, count: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    opened = [safe_open(file, framework="pt") for file in files]
    for name in names:
        tensors = [model.get_tensor(name) for model in opened]  # type: ignore[no-untyped-call]
        try:
            yield method(tensors)
        except ValueError as exc:
            raise IncompatibleError(
                f"{files[0]} and {len(files) - 1} others cannot be averaged",
                found=f"{name}: {exc}",
                expected="floating-point tensors, or the same values in all",
                remedy="ensemble these models instead",
            ) from exc
        count(1)


def _common_header(files: Sequence[Path]) -> Header:
    headers = [read_header(file) for file in files]
    shapes = [{name: (t["dtype"], t["shape"]) for name, t in h.items() if name != METADATA} for h in headers]
    for file, other in zip(files[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            name = next(n for n in sorted({*shapes[0], *other}) if shapes[0].get(n) != other.get(n))
            raise IncompatibleError(
                f"{file} cannot be averaged with {files[0]}",
                found=f"{name}: {other.get(name)}",
                expected=f"{name}: {shapes[0].get(name)}",
                remedy="average only models of one architecture",
            )
    return headers[0]
