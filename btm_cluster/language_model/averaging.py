"""Models made one: averaged piece by piece, or merged by a method, a tensor of each at a time."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import TypeAlias, TypeVar

import torch

from btm_cluster.equations.averaging import same_in_all
from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.delta_weights import LoraWeights
from btm_cluster.language_model.stored_weights import ShardWriter, StoredWeights
from btm_cluster.language_model.streamed_weights import in_pieces
from btm_cluster.language_model.tensor_files import DTYPES, Header, header_of, names_in_order
from btm_cluster.language_model.weighted_sums import SUMMED_AT_ONCE, cut, weighted_sums, widened

Method: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Makes one tensor of one of each model, all of one shape; those of half precision come as float32.

Raises ValueError where that cannot be.
"""
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
            return self._method([widened(tensor) for tensor in tensors])
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
        for start, size in cut(count, SUMMED_AT_ONCE):
            read = (model.pieces(name, first + start, size) for model in self._models)
            yield from weighted_sums(read, [self._weights], size)

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
        """Writes each average with its writer; `count` is told of each tensor that was read.

        With several `threads` of `pool` each sums some blocks of its share of the averages, for which it widens
        pieces once.
        """
        under_way: deque[Future[None]] = deque()
        try:
            for name in names_in_order(self._models[0].header):
                if not _is_summed(self._common, name):
                    self._write_same(writers, name)
                elif threads == 1:  # a model's piece is read once that of the one before is summed
                    self._write_one_by_one(writers, name)
                else:
                    for job in self._sums(writers, name, threads):
                        under_way.append(pool.submit(job))
                        if len(under_way) > threads:
                            under_way.popleft().result()
                count(1)
            for sums in under_way:
                sums.result()
        finally:
            wait(under_way)  # before their files are closed

    def _write_same(self, writers: Sequence[ShardWriter], name: str) -> None:
        tensors = [model.read(name) for model in self._stored]
        for writer, whole, weights_M in zip(writers, self._wholes, self._weights_AM, strict=True):
            writer.write(name, 0, whole.made_of(name, _with_weight(tensors, weights_M)))

    def _write_one_by_one(self, writers: Sequence[ShardWriter], name: str) -> None:
        for start, size in self._cut(name):
            read_M = (model.pieces(name, start, size) for model in self._models)
            self._write_sums(writers, range(len(writers)), name, start, size, read_M)

    def _sums(self, writers: Sequence[ShardWriter], name: str, threads: int) -> Iterator[Callable[[], None]]:
        """The sums of a tensor as functions to be called, one for each block and share of the averages: each comes once
        the block is read."""
        shares = [range(first, len(writers), threads) for first in range(min(threads, len(writers)))]
        for start, size in self._cut(name):
            read_M = [model.pieces(name, start, size) for model in self._models]
            block_M = [
                # To multiply B·A takes longer than to sum: left to the thread that sums.
                pieces if len(shares) == 1 and isinstance(model, LoraWeights) else list(pieces)
                for model, pieces in zip(self._models, read_M, strict=True)
            ]
            for share in shares:
                yield partial(self._write_sums, writers, share, name, start, size, block_M)

    def _write_sums(
        self,
        writers: Sequence[ShardWriter],
        share: Sequence[int],
        name: str,
        start: int,
        size: int,
        read_M: Iterable[Iterable[torch.Tensor]],
    ) -> None:
        sums = weighted_sums(read_M, [self._weights_AM[number] for number in share], size)
        for number, part in zip(share, sums, strict=True):
            writers[number].write(name, start, part)

    def _cut(self, name: str) -> Iterator[tuple[int, int]]:
        return cut(math.prod(self._common[name]["shape"]), SUMMED_AT_ONCE)


def average_models(models: Sequence[StoredWeights], weights: Sequence[float]) -> AveragedWeights:
    """Σ w_i θ_i of `models`, summed in float32."""
    return AveragedWeights(models, weights)


def _with_weight(items: Sequence[Item], weights_M: Sequence[float]) -> list[Item]:
    return [item for item, weight in zip(items, weights_M, strict=True) if weight]


def _is_summed(header: Header, name: str) -> bool:
    return DTYPES[header[name]["dtype"]].is_floating_point


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
