"""The process group of a training: this process's rank, and how the ranks agree.

A process alone is a group of one. Whoever starts the processes sets torch's process group up.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """One rank's view of the group. `any`, `sum` and `from_first` are collectives: all ranks call them, or none."""

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
