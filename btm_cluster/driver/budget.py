"""What steps have cost, over all commands with a store, and the stop once the plan's budget is spent.

A step with resources of its own (training, scoring) costs from its first report at work until its outcome.
The sums of a run are kept in the store, in `logs/<run>/spent.json`.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.port import Outcome, Workers
from btm_cluster.driver.room import devices
from btm_cluster.errors import BudgetError, Stopped, StoreError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.records import LOGS
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.requests.progress import Progress, Watcher
from btm_cluster.storage import Storage
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
STORE_SECONDS = 30.0
"""Between two times that a run's sums are stored: what a killed driver may have spent unnoticed."""
_FILE = "spent.json"
_IDLE = ("waiting", "warming up")
"""Beginnings of phases that a step reports before it is at work, or when its cluster has no room for it."""


@dataclass(frozen=True)
class Spent:
    """What steps have cost."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    """Of steps without a GPU."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.gpu_hours + other.gpu_hours, self.cpu_hours + other.cpu_hours)

    def by(self, limit: str, plan: Plan) -> float:
        """In the unit of a limit of the plan's budget."""
        if limit == "money":
            return self.gpu_hours * (plan.cluster.price_per_gpu_hour or 0.0)
        return self.gpu_hours if limit == "gpu_hours" else self.cpu_hours


def limits(plan: Plan) -> dict[str, float]:
    """The limits that the plan gives, by their names in `budget`."""
    given: dict[str, float | None] = plan.budget.model_dump()
    return {name: value for name, value in given.items() if value is not None}


def spent_in(storage: Storage) -> Spent:
    """What all runs with a store have cost."""
    keys = [entry.key for entry in storage.list(LOGS) if entry.key.endswith(f"/{_FILE}")]
    return sum((Spent(**json.loads(storage.read(key))) for key in keys), Spent())


def budget_notes(plan: Plan, storage: Storage, to_come: Spent) -> Iterator[str]:
    """A sentence for each limit: what of it is spent, and whether it is enough for what is to come."""
    given = limits(plan)
    spent = spent_in(storage) if given else Spent()
    for name, most in given.items():
        before, after = spent.by(name, plan), (spent + to_come).by(name, plan)
        told = _told(name, spent, plan)
        if after > most:
            told += f", and about {after - before:,.3g} is to come: the run will stop at a checkpoint"
        yield told


def _told(limit: str, spent: Spent, plan: Plan) -> str:
    return f"{spent.by(limit, plan):,.4g} of {limits(plan)[limit]:,.4g} is spent (budget.{limit})"


@dataclass
class _Work:
    """Steps that one process does: what they hold, since when, and how many are still to come."""

    how: Resources
    steps: int
    since: float | None = None


@dataclass
class Meter:
    """Adds up what the steps of one run cost, as a watcher of their progress."""

    plan: Plan
    storage: Storage
    watcher: Watcher
    stop: threading.Event
    """Set once the budget is spent."""
    clock: Callable[[], float] = time.monotonic
    is_spent: bool = False
    _now: Spent = Spent()
    _work: dict[object, _Work] = field(default_factory=dict)
    _process: dict[str, object] = field(default_factory=dict)
    """Which work a label's reports are of."""

    def __post_init__(self) -> None:
        self._before = spent_in(self.storage) if limits(self.plan) else Spent()
        self._run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
        self._stored_at = self.clock()

    def __call__(self, progress: Progress) -> None:
        self.watcher(progress)
        work = self._work.get(self._process.get(progress.label))
        if work is not None and work.since is None and not progress.phase.startswith(_IDLE):
            work.since = self.clock()
        self.count()

    @property
    def spent(self) -> Spent:
        """By all runs with the store, this one included."""
        return self._before + self._now

    def expect(self, requests: Sequence[StepRequest]) -> None:
        """Takes up steps that are asked for."""
        for request in requests:
            if request.group is not None:
                key = request.batch or request.ref
                self._process[request.label] = key
                self._work.setdefault(key, _Work(request.group, 0)).steps += 1

    def ended(self, request: StepRequest) -> None:
        """Notes that a step has its outcome."""
        self.count()
        key = request.batch or request.ref
        if (work := self._work.get(key)) is not None:
            work.steps -= 1
            if not work.steps:
                del self._work[key]

    def count(self) -> None:
        """Adds what was spent since it was last called; asks to stop once that is too much."""
        now = self.clock()
        for work in self._work.values():
            if work.since is not None:
                hours = (now - work.since) * devices(work.how) / 3600
                on_gpus = work.how.gpus_per_worker > 0
                self._now += Spent(gpu_hours=hours) if on_gpus else Spent(cpu_hours=hours)
                work.since = now
        if self.over and not self.is_spent:
            self.is_spent = True
            self.stop.set()
        if now - self._stored_at >= STORE_SECONDS:
            self.store()

    @property
    def over(self) -> str:
        """The limit of the budget that is reached; empty where none is."""
        given = limits(self.plan)
        return next((name for name, most in given.items() if self.spent.by(name, self.plan) >= most), "")

    def end(self) -> None:
        """Ends all work, and stores what it has cost."""
        self.count()
        self._work.clear()
        self._process.clear()
        self.store()

    def store(self) -> None:
        """Stores the sums of this run; a store that is out is tried again the next time."""
        self._stored_at = self.clock()
        if self._now == Spent():
            return
        try:
            with scratch_folder() as folder:
                (folder / _FILE).write_text(json.dumps(vars(self._now)), encoding="utf-8")
                self.storage.upload(f"{LOGS}{self._run}/{_FILE}", folder / _FILE)
        except StoreError as exc:
            log.warning("what this run has cost was not stored, the next time tries again: %s", exc)


class MeteredWorkers:
    """The workers' port, which starts nothing once the budget is spent."""

    def __init__(self, workers: Workers, meter: Meter, ledger: Ledger) -> None:
        self._workers, self._meter, self._ledger = workers, meter, ledger

    def check_budget(self, demands: Sequence[Demand]) -> None:
        """Refuses trainings once the budget is spent.

        Raises:
            BudgetError: saying what was spent.
        """
        if demands and self._meter.over:
            raise self._error([])

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Nothing gets ready that could not be paid for."""
        if not self._meter.over:
            self._workers.get_ready(trainings)

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        if self._meter.over and any(request.group is not None for request in requests):
            raise self._error(requests)
        left = {request.ref: request for request in requests}
        self._meter.expect(requests)
        try:
            with closing(self._workers.run(requests)) as steps:
                for request, outcome in steps:
                    self._meter.ended(request)
                    left.pop(request.ref, None)
                    yield request, outcome
        except Stopped as exc:
            if self._meter.is_spent:
                raise self._error(list(left.values())) from exc
            raise
        finally:
            self._meter.end()

    def _error(self, requests: Sequence[StepRequest]) -> BudgetError:
        trainings = [request for request in requests if isinstance(request, TrainRequest)]
        saved = [(one.label, self._ledger.latest_training(one.ref.identity)) for one in trainings]
        points = ", ".join(f"{label} at update {one.recipe['update']:,}" for label, one in saved if one)
        limit, plan = self._meter.over, self._meter.plan
        return BudgetError(
            "the plan's budget is spent: everything is saved, and nothing more is started",
            found=_told(limit, self._meter.spent, plan),
            remedy=f"raise budget.{limit} and run the same command: it goes on"
            + (f", {points}" if points else " from here"),
        )
