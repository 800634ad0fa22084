"""Progress as lines of a log: phases as they begin, then now and then how far they are, and what has ended."""

import logging
import time
from collections.abc import Callable

from btm_cluster.driver.outlook import Count, Outlook
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.step_kinds import kind_of
from btm_cluster.requests import StepRequest
from btm_cluster.requests.progress import Phase, Progress
from btm_cluster.terminal.amounts import amount, checkpoint, duration, loss, rate, seconds_left, time_left

log = logging.getLogger(__name__)
LINE_SECONDS = 15.0
"""Between two lines on a phase that goes on."""
WHOLE_SECONDS = 60.0
"""Between two lines on the whole run."""
SHORT_PHASES: tuple[Phase, ...] = ("fitting", "mixing", "averaging")
"""Phases without lines of their own, since there are many: they are counted with the whole run."""


class LogLines:
    """Writes lines about a run to this module's logger."""

    def __init__(self, outlook: Outlook, clock: Callable[[], float] = time.monotonic) -> None:
        self._outlook, self._clock = outlook, clock
        self._said: dict[str, tuple[tuple[Phase, str], float]] = {}
        self._whole_said = clock()

    def hear(self, progress: Progress) -> None:
        """A progress report."""
        now = self._clock()
        what = (progress.phase, progress.note)
        before, said = self._said.get(progress.label, (None, 0.0))
        is_last = progress.phase == "training" and 0 < progress.total == progress.done
        is_due = what != before or now - said >= LINE_SECONDS or is_last
        if is_due:
            self._said[progress.label] = (what, now)
        is_worth_it = is_due and progress.phase not in SHORT_PHASES
        log.log(logging.INFO if is_worth_it else logging.DEBUG, "%s", line_of(progress))

    def end(self, request: StepRequest, outcome: Outcome) -> None:
        """A step came to its end: failures are told, and that all steps of a kind are done."""
        if isinstance(outcome, Failure):
            if outcome.attempts:  # others come of it
                log.error(
                    "%s failed after %d attempt(s), %s: %s",
                    outcome.label,
                    outcome.attempts,
                    outcome.where,
                    outcome.cause,
                )
            return
        log.debug("%s: done", request.label)
        kind = kind_of(request)
        if self._outlook.has_finished(kind):
            log.info("%s", describe(self._outlook.count_of(kind)))

    def whole(self, elapsed_seconds: float, left: float | None) -> None:
        """How far the whole run is, if it is time to say so."""
        now = self._clock()
        if now - self._whole_said < WHOLE_SECONDS:
            return
        self._whole_said = now
        counts = ", ".join(map(describe, self._outlook.counts()))
        estimate = "" if left is None else f", {time_left(left)}"
        log.info("%s so far%s: %s", duration(elapsed_seconds), estimate, counts)


def describe(count: Count) -> str:
    """`3/8 experts trained`."""
    failed = f" ({count.failed} failed)" if count.failed else ""
    return f"{count.done}/{count.total} {count.kind.done}{failed}"


def line_of(progress: Progress) -> str:
    """A progress report on one line."""
    left = seconds_left(progress)
    parts = [
        f"{progress.label}: {progress.phase}",
        progress.note,
        amount(progress),
        loss(progress),
        rate(progress),
        time_left(left) if left else "",
        checkpoint(progress),
    ]
    return " ".join(filter(None, parts))
