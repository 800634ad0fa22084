"""A torch.profiler trace of a few updates of a training, to be looked at in Perfetto or chrome://tracing."""

import logging
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from btm_cluster.errors import one_line

log = logging.getLogger(__name__)
SKIPPED_UPDATES = 8
"""Updates of a run before the first traced one: the GPU's code is compiled and CUDA graphs are recorded in these."""
TRACED_UPDATES = 3


class Trace:
    """The trace of one run of the train loop; without a file, none is made. No result depends on it, and no training
    fails by it."""

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
        """Ends the trace, where it goes on, and writes it; warns where that cannot be done, and leaves no file."""
        if self._profiler is None:
            return
        assert self._file is not None, "what is traced has a file"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        profiler, self._profiler = self._profiler, None
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(self._file))
        except (OSError, RuntimeError) as exc:
            log.warning("no trace of the updates: %s", one_line(exc))
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def give_up(self) -> None:
        """Ends the trace, where it goes on, and forgets it: after an error of the training, which stays the one that
        is raised."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            with suppress(RuntimeError):
                profiler.stop()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)  # kernels of updates before are not in it
        # Without acc_events some versions warn that they keep one cycle.
        profiler = profile(activities=activities, acc_events=True)
        try:
            profiler.start()
        except RuntimeError as exc:
            log.warning("no trace of the updates: %s", one_line(exc))
            return
        self._profiler = profiler
