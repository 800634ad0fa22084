"""Work on fixed buffers, captured as CUDA graphs: a graph is launched at
once, however many kernels it has."""

import logging
from collections.abc import Callable, Hashable, Mapping

import torch

log = logging.getLogger(__name__)


class Graphs:
    """Runs functions that read and write the same buffers each time, each on one of several streams.

    On a GPU a function is run as it is the first time, which also warms up its kernels; the second time it is
    captured, and from then on replayed. Where it cannot be captured, and on a CPU, it is run as it is.
    """

    def __init__(self, device: torch.device, streams: int, captures: bool = True) -> None:
        self._is_cuda = device.type == "cuda"
        self.captures = captures and self._is_cuda
        count = streams if self._is_cuda else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]  # type: ignore[no-untyped-call]
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(count)]
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run_all(self, name: Hashable, functions: Mapping[int, Callable[[], None]]) -> None:
        """Runs functions beside each other, by the number of their stream, after all
        work so far and before all to come.

        `name` says what the functions depend on beside their buffers: another shape is another name.
        """
        if not self._is_cuda:
            for function in functions.values():
                function()
            return
        now = torch.cuda.current_stream()
        for number, function in functions.items():
            stream = self._streams[number]
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                self._run((name, number), number, function)
        for number in functions:
            now.wait_stream(self._streams[number])

    def _run(self, key: Hashable, number: int, function: Callable[[], None]) -> None:
        if not self.captures or key not in self._graphs:
            self._graphs[key] = None
            function()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(number, function)
        if graph is None:
            function()
        else:
            graph.replay()

    def _capture(self, number: int, function: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others may allocate memory meanwhile.
            graph.capture_begin(pool=self._pools[number], capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError as exc:
            log.warning("a step cannot be captured as a CUDA graph, and runs kernel by kernel: %s", exc)
            self.captures = False
            return None
        return graph
