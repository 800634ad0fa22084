"""Models made one: averaged piece by piece, or merged by a method, a tensor of each at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch

from btm_cluster.equations.averaging import same_in_all
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.streamed_weights import in_pieces
from btm_cluster.language_model.tensor_files import DTYPES, Header, header_of, names_in_order

Method: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes one tensor of one of each model, all of one shape; those of half precision come as float32.

Raises ValueError where that cannot be.
"""
SUMMED_AT_ONCE = 2**17
"""Elements: their sum and a model's elements in float32, 512 KiB each, stay in a core's cache while all models are
added up."""
HALF_PRECISION = (torch.bfloat16, torch.float16)


class MergedWeights:
    """Several models averaged or merged by a method, tensor by tensor as it is read.

    It is to be stored in their dtype, and in the widest where they differ.

    Raises:
        IncompatibleError: tensors of other names or shapes, checked before any weight is read; or, where one
            is read, whole numbers that differ.
    """

    def __init__(self, models: Sequence[StoredWeights], method: Method) -> None:
        self._models, self._method = models, method
        self._header = _common_header(models)

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        try:
            # On the CPU, so that an average is the same wherever it goes.
            return self._method([_widened(model.read(name)) for model in self._models]).to(device)
        except ValueError as exc:
            raise IncompatibleError(
                f"{self} cannot be averaged",
                found=f"{name}: {exc}",
                expected="floating-point tensors, or the same values in all",
                remedy="ensemble these models instead",
            ) from exc

    def __str__(self) -> str:
        return f"{self._models[0]} and {len(self._models) - 1} others"


class AveragedWeights:
    """Σ w_i θ_i of several models, summed in float32 in their order, piece by piece as it is read.

    It is to be stored in their dtype, and in the widest where they differ. Whole numbers and switches have no
    weighted sum: they must be the same in all.

    Raises:
        IncompatibleError: as of merged weights.
    """

    def __init__(self, models: Sequence[StoredWeights], weights: Sequence[float]) -> None:
        self._header = _common_header(models)
        self._whole = MergedWeights(models, same_in_all)
        self._models = [(in_pieces(model), weight) for model, weight in zip(models, weights, strict=True)]

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        shape = self._header[name]["shape"]
        if not self._is_summed(name):
            return self._whole.read(name, device)
        found, first = torch.empty(math.prod(shape), dtype=torch.float32), 0
        for part in self.pieces(name, 0, len(found)):
            found[first : first + len(part)] = part
            first += len(part)
        return found.reshape(shape).to(device)

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        if not self._is_summed(name):
            yield self._whole.read(name).reshape(-1)[first : first + count]
            return
        stop = first + count
        # Widened here and not by `add_`, which would allocate as much for every piece.
        wide = torch.empty(min(SUMMED_AT_ONCE, count), dtype=torch.float32)
        for start in range(first, stop, SUMMED_AT_ONCE):
            total = torch.zeros(min(SUMMED_AT_ONCE, stop - start), dtype=torch.float32)
            for model, weight in self._models:
                at = 0
                for piece in model.pieces(name, start, len(total)):
                    addend = wide[: len(piece)].copy_(piece) if piece.dtype in HALF_PRECISION else piece
                    total[at : at + len(piece)].add_(addend, alpha=weight)
                    at += len(piece)
            yield total

    def _is_summed(self, name: str) -> bool:
        return DTYPES[self._header[name]["dtype"]].is_floating_point

    def __str__(self) -> str:
        return str(self._whole)


def average_models(models: Sequence[StoredWeights], weights: Sequence[float]) -> AveragedWeights:
    """Σ w_i θ_i of `models`, summed in float32."""
    return AveragedWeights(models, weights)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in HALF_PRECISION else tensor


def _common_header(models: Sequence[StoredWeights]) -> Header:
    first = models[0].header
    names = names_in_order(first)
    entries = {name: first[name] for name in names}
    for model in models[1:]:
        other = model.header
        for name in sorted({*names, *names_in_order(other)}):
            found, expected = (_form(header, name) for header in (other, entries))
            wider = _wider(found, expected)
            if wider is None:
                raise IncompatibleError(
                    f"{model} cannot be averaged with {models[0]}",
                    found=f"{name}: {found}",
                    expected=f"{name}: {expected}",
                    remedy="average only models of one architecture",
                )
            entries[name] = {**entries[name], "dtype": wider}
    return header_of(entries, names)


def _form(header: Header, name: str) -> tuple[str, list[int]] | None:
    return (header[name]["dtype"], header[name]["shape"]) if name in header else None


def _wider(one: tuple[str, list[int]] | None, other: tuple[str, list[int]] | None) -> str | None:
    """The dtype that holds both of two tensors; None where they have no average."""
    if one is None or other is None or one[1] != other[1]:
        return None
    if one[0] == other[0]:
        return one[0]
    dtypes = [DTYPES[one[0]], DTYPES[other[0]]]
    if not all(dtype.is_floating_point for dtype in dtypes):
        return None
    both = torch.promote_types(*dtypes)
    return next(name for name, dtype in DTYPES.items() if dtype == both)
