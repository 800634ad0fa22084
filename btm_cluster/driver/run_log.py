"""Stores the timeline of a run, now and then and at its end. None fails for it."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from btm_cluster.driver.run_events import RunEvents
from btm_cluster.errors import Stopped, StoreError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.timelines import Outcome, write_timeline
from btm_cluster.stopping import Interruption

log = logging.getLogger(__name__)
STORE_SECONDS = 60.0
"""Between two times that it is stored: what a killed driver loses."""
LAST_SECONDS = 30.0
"""How long the end of a run waits for it, where the store is out."""


Finish: TypeAlias = Callable[[Sequence[Mapping[str, Any]], Path | None], None]


class RunLog:
    """The timeline of one run in the store, for as long as the run goes on."""

    def __init__(self, ledger: Ledger, events: RunEvents, finish: Finish = lambda *_: None) -> None:
        self._ledger, self._events, self._finish = ledger, events, finish
        self._outcome: Outcome = "running"
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._store_now_and_then, daemon=True, name="timeline")

    @property
    def run(self) -> str:
        """The run's name in the store."""
        return self._events.run

    def __enter__(self) -> "RunLog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome = (
            "done" if kind is None else "stopped" if issubclass(kind, Stopped | Interruption) else "failed"
        )
        self._ended.set()
        self._thread.join(LAST_SECONDS)

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None = None) -> None:
        """Passes the run's outcome on to where its curves go: the verdict's rows, and the report, a local
        file."""
        self._finish(verdict, report)

    def store(self) -> None:
        """Stores what happened until now, if anything did."""
        if not self._events.are_any:
            return
        with self._lock:
            try:
                write_timeline(self._ledger, self.run, self._events.timeline(self._outcome))
            except (StoreError, OSError) as exc:
                log.warning("the run's timeline was not stored: %s", exc)

    def _store_now_and_then(self) -> None:
        while not self._ended.wait(STORE_SECONDS):
            self.store()
        self.store()
