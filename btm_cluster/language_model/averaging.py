"""Merges stored models into one safetensors file, holding one tensor of each at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from btm_cluster.equations.averaging import average_tensor
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import Header, names_in_order, write_tensors

Method: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes one tensor of one of each model, all of one shape.

Raises ValueError where that cannot be.
"""


def average_models(models: Sequence[StoredWeights], weights: Sequence[float], target: Path) -> None:
    """Writes Σ w_i θ_i of `models` to `target`, as `merge_models` does."""
    merge_models(models, partial(average_tensor, weights=weights), target)


def merge_models(
    models: Sequence[StoredWeights],
    method: Method,
    target: Path,
    count: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes what `method` makes of `models`, tensor by tensor, to `target`.

    Memory: a few tensors, whatever the number of models' tensors. `count` is told of each that is made.

    Raises:
        IncompatibleError: tensors of other names or shapes, checked from the headers before any weight is
            read; or whole numbers that differ.
    """
    header = _common_header(models)
    write_tensors(header, _merged(models, names_in_order(header), method, count), target)


def _merged(
    models: Sequence[StoredWeights], names: Sequence[str], method: Method, count: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    for name in names:
        try:
            yield method([model.read(name) for model in models])
        except ValueError as exc:
            raise IncompatibleError(
                f"{models[0]} and {len(models) - 1} others cannot be averaged",
                found=f"{name}: {exc}",
                expected="floating-point tensors, or the same values in all",
                remedy="ensemble these models instead",
            ) from exc
        count(1)


def _common_header(models: Sequence[StoredWeights]) -> Header:
    shapes = [
        {
            name: (model.header[name]["dtype"], model.header[name]["shape"])
            for name in names_in_order(model.header)
        }
        for model in models
    ]
    for model, other in zip(models[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            name = next(n for n in sorted({*shapes[0], *other}) if shapes[0].get(n) != other.get(n))
            raise IncompatibleError(
                f"{model} cannot be averaged with {models[0]}",
                found=f"{name}: {other.get(name)}",
                expected=f"{name}: {shapes[0].get(name)}",
                remedy="average only models of one architecture",
            )
    return models[0].header
