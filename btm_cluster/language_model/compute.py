"""How a model is computed: device, threads, precision, micro-batch.

Results depend on it; a model's identity does not.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch


@dataclass(frozen=True)
class Compute:
    """Settings of one process."""

    device: torch.device
    threads: int
    """CPU threads; without effect on a GPU."""
    micro_batch_blocks: int
    """Blocks in one forward pass."""
    precision: str
    """float32 or bfloat16, in the forward pass. Weights, gradients and moments are float32."""
    compile: bool
    is_sharded: bool = False
    """Each rank of the group holds a part of every weight, which is gathered in the forward pass's precision."""
    recomputes: bool = False
    """Activations are computed once more for the backward pass."""

    @property
    def compiles_layers(self) -> bool:
        """Whether a model is compiled layer by layer, not as a whole: where weights are gathered between layers,
        and where they are large enough to be computed twice."""
        return self.compile and (self.is_sharded or self.recomputes)

    def arithmetic(self) -> AbstractContextManager[Any]:
        """Context of a forward pass: the precision, unless the weights are gathered in it."""
        return nullcontext() if self.is_sharded else autocast(self.device, self.precision)

    def set_up(self) -> None:
        """Sets torch's settings of this process; to be called before a model is built."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        else:
            torch.set_float32_matmul_precision("high")


def device_of(gpus: float) -> torch.device:
    """The device of a process that holds so many GPUs."""
    return torch.device("cuda" if gpus > 0 else "cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of this machine within its container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):  # no container, or one without a limit: `max`
        return free
    return min(free, limit - int(used))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Runs a forward pass in a precision."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def device_name(device: torch.device) -> str:
    """The device's name, such as "NVIDIA H200" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
