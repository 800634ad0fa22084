"""A torch.profiler trace of a few updates of a training, to be looked at in Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

SKIPPED_UPDATES = 8
"""Updates of a run before the first traced one: the GPU's code is compiled and CUDA graphs are recorded in these."""
TRACED_UPDATES = 3


class Trace:
    """The trace of one run of the train loop; without a file, none is made. No result depends on it."""

    def __init__(self, file: Path | None, device: torch.device, updates: int) -> None:
        """For so many updates to come: of a short run, the second half is traced."""
        self._file, self._device = file, device
        self._first = min(SKIPPED_UPDATES, updates // 2)
        self._passed = 0
        self._profiler: profile | None = None

    def update_begins(self) -> None:
        """Before each update."""
        if self._file is None:
            return
        if self._passed == self._first:
            self._begin()
        elif self._passed == self._first + TRACED_UPDATES:
            self.write()
        self._passed += 1

    def write(self) -> None:
        """Ends the trace, where it goes on, and writes it."""
        self._end()
        if self._profiler is not None:
            self._profiler.export_chrome_trace(str(self._file))
            self._profiler = None

    def give_up(self) -> None:
        """Ends the trace, where it goes on, and forgets it."""
        self._end()
        self._profiler = None

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # kernels of updates before are not in it
        profiler = profile(
            activities=activities, acc_events=True
        )  # else some versions warn that they keep one cycle
        profiler.start()
        self._profiler = profiler

    def _end(self) -> None:
        if self._profiler is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profiler.stop()
