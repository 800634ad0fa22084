"""Models made one: averaged piece by piece, or merged by a method, a tensor of each at a time."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from btm_cluster.equations.averaging import same_in_all
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.stored_weights import ShardWriter, StoredWeights
from btm_cluster.language_model.streamed_weights import in_pieces
from btm_cluster.language_model.tensor_files import DTYPES, Header, header_of, names_in_order

Method: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes one tensor of one of each model, all of one shape; those of half precision come as float32.

Raises ValueError where that cannot be.
"""
SUMMED_AT_ONCE = 2**17
"""Elements: their sum and a model's elements in float32, 512 KiB each, stay in a core's cache while all models are
added up. As many for several averages, whose sums are then the same bit by bit on any processor."""
HALF_PRECISION = (torch.bfloat16, torch.float16)
Item = TypeVar("Item")


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
        # On the CPU, so that an average is the same wherever it goes.
        return self.made_of(name, [model.read(name) for model in self._models]).to(device)

    def made_of(self, name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of this name, made of those of the models, which were read already."""
        try:
            return self._method([_widened(tensor) for tensor in tensors])
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
        self._models, self._weights = [in_pieces(model) for model in models], weights

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
        for start, size in _blocks(first, count):
            read = (model.pieces(name, start, size) for model in self._models)
            yield from _weighted_sums(read, [self._weights], size)

    def _is_summed(self, name: str) -> bool:
        return _is_summed(self._header, name)

    def __str__(self) -> str:
        return str(self._whole)


class AveragesTogether:
    """Several averages of the same models, written in one pass: each piece of each model is read once, and added to
    all sums.

    Each average is that of the models that have a weight other than zero in it, with the same bits as alone.

    Args:
        weights_AM: the weights of each average, in order of the models.

    Raises:
        IncompatibleError: as of merged weights.
    """

    def __init__(self, models: Sequence[StoredWeights], weights_AM: Sequence[Sequence[float]]) -> None:
        self._stored, self._weights_AM = models, weights_AM
        self._models = [in_pieces(model) for model in models]
        self._common = _common_header(models)
        self._wholes = [MergedWeights(_with_weight(models, one), same_in_all) for one in weights_AM]

    @property
    def headers(self) -> list[Header]:
        """That of each average."""
        return [whole.header for whole in self._wholes]

    def write(
        self, writers: Sequence[ShardWriter], pool: Executor, threads: int, count: Callable[[int], None]
    ) -> None:
        """Writes each average with its writer; `count` is told of each tensor that is done with in all.

        With several `threads` of `pool` each has its share of the averages, and widens pieces once for all of it.
        """
        shares = [range(first, len(writers), threads) for first in range(min(threads, len(writers)))]
        for name in names_in_order(self._models[0].header):
            if not _is_summed(self._common, name):
                tensors = [model.read(name) for model in self._stored]
                for writer, whole, weights_M in zip(writers, self._wholes, self._weights_AM, strict=True):
                    writer.write(name, 0, whole.made_of(name, _with_weight(tensors, weights_M)))
                count(1)
                continue
            for start, size in _blocks(0, math.prod(self._common[name]["shape"])):
                write = partial(self._write_sums, writers, name, start, size)
                read = (model.pieces(name, start, size) for model in self._models)
                if len(shares) == 1:
                    write(read, shares[0])
                else:
                    held = [list(pieces) for pieces in read]
                    list(pool.map(partial(write, held), shares))
            count(1)

    def _write_sums(
        self,
        writers: Sequence[ShardWriter],
        name: str,
        start: int,
        size: int,
        read_M: Iterable[Iterable[torch.Tensor]],
        share: Sequence[int],
    ) -> None:
        sums = _weighted_sums(read_M, [self._weights_AM[number] for number in share], size)
        for number, part in zip(share, sums, strict=True):
            writers[number].write(name, start, part)


def average_models(models: Sequence[StoredWeights], weights: Sequence[float]) -> AveragedWeights:
    """Σ w_i θ_i of `models`, summed in float32."""
    return AveragedWeights(models, weights)


def _with_weight(items: Sequence[Item], weights_M: Sequence[float]) -> list[Item]:
    return [item for item, weight in zip(items, weights_M, strict=True) if weight]


def _is_summed(header: Header, name: str) -> bool:
    return DTYPES[header[name]["dtype"]].is_floating_point


def _blocks(first: int, count: int) -> Iterator[tuple[int, int]]:
    """Where the elements from `first` on that are summed at once begin, and how many they are."""
    stop = first + count
    return ((start, min(SUMMED_AT_ONCE, stop - start)) for start in range(first, stop, SUMMED_AT_ONCE))


def _weighted_sums(
    read_M: Iterable[Iterable[torch.Tensor]], weights_AM: Sequence[Sequence[float]], size: int
) -> list[torch.Tensor]:
    """Σ w_i θ_i in float32 of `size` elements, as they are read in pieces of each model, for each average."""
    totals = [torch.zeros(size, dtype=torch.float32) for _ in weights_AM]
    # Widened here and not by `add_`, which would allocate as much for every piece.
    wide = torch.empty(size, dtype=torch.float32)
    for model, pieces in enumerate(read_M):
        weighted = [(total, weights_M[model]) for total, weights_M in zip(totals, weights_AM, strict=True)]
        at = 0
        for piece in pieces:
            addend = wide[: len(piece)].copy_(piece) if piece.dtype in HALF_PRECISION else piece
            for total, weight in weighted:
                if weight:
                    total[at : at + len(piece)].add_(addend, alpha=weight)
            at += len(piece)
    return totals


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
