"""The process group of a training: this process's rank, and how the ranks agree.

A process alone is a group of one. Whoever starts the processes sets torch's process group up.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from btm_cluster.errors import TrainingError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """One rank's view of the group. `any`, `sum`, `from_first` and `made_by_first` are collectives: all ranks
    call them, or none."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def joined(cls, device: torch.device) -> "ProcessGroup":
        """The group that this process is in; `device` carries its messages."""
        if not dist.is_initialized():
            return cls(0, 1, device)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this rank reads and writes for the group."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is up on any rank."""
        if self.world == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the group's device over all ranks; a GPU is not waited for."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def from_first(self, value: T) -> T:
        """The first rank's `value`, on every rank; it is pickled."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def made_by_first(self, make: Callable[[], T]) -> T | None:
        """The result of `make`, which the first rank alone calls; None on the others. What it raises is raised on
        every rank: the others would wait for what is sent next.

        One that cannot be pickled is told to the others in words, as a TrainingError.
        """
        made: T | None = None
        raised: Exception | None = None
        if self.is_first:
            try:
                made = make()
            except Exception as exc:
                raised = exc
        told = self.from_first(raised and _picklable(raised))
        if raised is not None:
            raise raised
        if told is not None:
            raise told
        return made


def _picklable(exc: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(exc))
    except Exception:  # pickling raises whatever an exception's own __reduce__ or __init__ does
        return TrainingError(
            "the first worker of the group failed", found=f"{type(exc).__name__}: {one_line(exc)}"
        )
    return exc
