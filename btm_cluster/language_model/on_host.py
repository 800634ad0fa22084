"""Values of a device on their way to the host, while the device goes on computing."""

import torch


class OnHost:
    """A tensor as it was when this was made. Reading waits for it alone, not for what the device was given to do
    since."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # From a GPU into locked memory, which torch reuses.
        self._copy = tensor.detach().to("cpu", non_blocking=True, copy=not tensor.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> torch.Tensor:
        """The tensor on the host, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy
