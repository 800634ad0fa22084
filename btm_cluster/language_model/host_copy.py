"""Copies of a device's tensors in the host's memory, at the same place each time.

The first copy gets the memory and locks its pages, so that the device writes to it at the speed of its bus: later
copies are several times faster.
"""

import contextlib
import logging
from collections.abc import Iterable

import torch

log = logging.getLogger(__name__)
ARENA_BYTES = 2**26
"""The least that is got from the system at once: what is locked must not share pages."""
_ALIGNMENT = 256


class HostCopy:
    """One copy of a set of tensors, which the next one overwrites."""

    def __init__(self) -> None:
        self._places: dict[str, torch.Tensor] = {}
        self._arena, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._locked: list[torch.Tensor] = []
        self._locks_pages = True

    def take(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies tensors by name; returns once they are there. One at a time is asked for."""
        taken = {}
        for name, tensor in tensors:
            place = self._places.get(name)
            if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
                place = self._places[name] = self._place_for(tensor)
            taken[name] = place.copy_(tensor, non_blocking=True)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return taken

    def close(self) -> None:
        """Unlocks the memory, which is freed once nobody holds a copy."""
        for arena in self._locked:
            refused = int(torch.cuda.cudart().cudaHostUnregister(arena.data_ptr()))  # type: ignore[no-untyped-call]
            if refused:
                log.warning("the host's memory cannot be unlocked (CUDA error %d)", refused)
                _clear_error()
        self._locked, self._places = [], {}
        self._arena, self._used = torch.empty(0, dtype=torch.uint8), 0

    def _place_for(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._used + size > self._arena.numel():
            self._arena, self._used = torch.empty(max(size, ARENA_BYTES), dtype=torch.uint8), 0
            self._lock(tensor.device)
        place = self._arena[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place.view(tensor.dtype).view(tensor.shape)

    def _lock(self, device: torch.device) -> None:
        if device.type != "cuda" or not self._locks_pages:
            return
        # Not by torch's own allocator of such memory, which rounds every size up to a power of two.
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        refused = int(runtime.cudaHostRegister(self._arena.data_ptr(), self._arena.numel(), 0))
        if refused:
            log.warning(
                "the host's memory cannot be locked (CUDA error %d): checkpoints take longer", refused
            )
            self._locks_pages = False
            _clear_error()
        else:
            self._locked.append(self._arena)


def _clear_error() -> None:
    """Takes the error that a refused call left in the CUDA runtime, which the next kernel would raise: by such a
    kernel, for torch has no call for it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
