"""Progress of a run: a live display at a terminal, lines of a log everywhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live

from btm_cluster.driver.outlook import AtOnce, Outlook
from btm_cluster.driver.port import Outcome
from btm_cluster.driver.steady_estimate import SteadyEstimate
from btm_cluster.ledger import Artifact
from btm_cluster.requests import StepRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.terminal.live import Screen
from btm_cluster.terminal.log_lines import LogLines, log
from btm_cluster.terminal.logs import is_quiet

ESTIMATE_SECONDS = 1.0
"""Between two estimates."""


class ProgressView:
    """Shows what it is told of: by steps as they report (it is a watcher), and by their driver (its listener)."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._lock = clock, clock(), threading.RLock()
        self._outlook, self._estimate = Outlook(clock=clock), SteadyEstimate()
        self._lines = LogLines(self._outlook, clock)
        self._estimated, self._share = self._began - ESTIMATE_SECONDS, 0.0
        self._doing = self._part = self._table = ""
        self._screen = Screen("", "", (), (), 0.0, None, 0.0)
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal and not is_quiet():
            self._live = Live(
                console=console,
                get_renderable=self.screen,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # or what is piped would be shown here
            )

    def __enter__(self) -> "ProgressView":
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the display: what is printed afterwards stays where it is."""
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            self._outlook.hear(progress)
            self._lines.hear(progress)
            self._estimate_anew()
            self._lines.whole(self._clock() - self._began, self._left())

    def say(self, what: str) -> None:
        """Shows an activity that is no step, such as `reading the plan`."""
        with self._lock:
            self._doing = what
            log.info("%s", what)
        if self._live:
            self._live.refresh()

    def part(self, what: str) -> None:
        with self._lock:
            self._part = what
            log.info("%s", what)

    def table(self, lines: str) -> None:
        with self._lock:
            self._table = lines
            if lines:
                log.info("%s", lines)

    def runs_on(self, at_once: AtOnce) -> None:
        """How many groups the workers hold at once: how long a run takes depends on it."""
        self._outlook.at_once = at_once

    def expect(self, requests: Iterable[StepRequest]) -> None:
        with self._lock:
            self._outlook.expect(requests)

    def found(self, request: StepRequest, artifact: Artifact) -> None:
        with self._lock:
            self._outlook.found(request, artifact)

    def ask(self, requests: Sequence[StepRequest]) -> None:
        with self._lock:
            self._outlook.ask(requests)

    def end(self, request: StepRequest, outcome: Outcome) -> None:
        with self._lock:
            self._outlook.end(request, outcome)
            self._lines.end(request, outcome)
            self._estimate_anew()

    def screen(self) -> Screen:
        """The present screen, or the last one while another thread is reporting.

        The thread that draws holds the terminal, which whoever tells may write a line to: it waits for nobody.
        """
        if not self._lock.acquire(blocking=False):
            return self._screen
        try:
            elapsed, left = self._clock() - self._began, self._left()
            if left is not None:
                self._share = max(self._share, min(0.99, elapsed / max(elapsed + left, 1e-9)))
            self._screen = Screen(
                self._doing,
                self._part,
                tuple(self._outlook.counts()),
                tuple(self._outlook.running()),
                elapsed,
                left,
                self._share,
                self._table,
            )
            return self._screen
        finally:
            self._lock.release()

    def _left(self) -> float | None:
        return None if self._part else self._estimate.left(self._clock())

    def _estimate_anew(self) -> None:
        """Estimates, if it is time to. By whoever reports: the thread that draws asks no workers."""
        now = self._clock()
        if now - self._estimated >= ESTIMATE_SECONDS:
            self._estimated = now
            self._estimate.update(now, self._outlook.seconds_left())
