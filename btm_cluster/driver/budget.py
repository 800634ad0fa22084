"""The cost of steps over all commands with a store, and the stop once the plan's budget is spent.

What a run holds stands in its timeline, which the store has of every run.
"""

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.port import Outcome, Workers
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.driver.saved import saved_points
from btm_cluster.errors import BudgetError, Stopped, UserError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.timelines import list_runs, read_timeline
from btm_cluster.plan import Plan
from btm_cluster.requests import StepRequest, TrainRequest
from btm_cluster.requests.progress import Progress, Watcher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """GPUs and CPUs that steps have held, times hours."""

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0

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


def spent_in(ledger: Ledger) -> Spent:
    """The cost of all runs with a store, by their timelines. One that cannot be read is left out, with a
    warning."""
    spent = Spent()
    for run in list_runs(ledger):
        try:
            one = read_timeline(ledger, run)
        except UserError as exc:
            log.warning("what the run %s has cost is not counted: %s", run, exc)
        else:
            spent += Spent(one.gpu_seconds / 3600, one.cpu_seconds / 3600)
    return spent


def budget_notes(plan: Plan, ledger: Ledger, to_come: Spent) -> Iterator[str]:
    """A sentence for each limit: what of it is spent, and whether it is enough for what is to come."""
    given = limits(plan)
    spent = spent_in(ledger) if given else Spent()
    for name, most in given.items():
        before, after = spent.by(name, plan), (spent + to_come).by(name, plan)
        told = _told(name, spent, plan)
        if after > most:
            told += f", and about {after - before:,.3g} is to come: the run will stop at a checkpoint"
        yield told


class Budget:
    """A watcher that asks to stop once the plan's budget is spent; `stop` is set then."""

    def __init__(
        self, plan: Plan, ledger: Ledger, events: RunEvents, watcher: Watcher, stop: threading.Event
    ) -> None:
        self._plan, self._ledger, self._events = plan, ledger, events
        self._watcher, self._stop = watcher, stop
        self._limits = limits(plan)
        self._before = spent_in(ledger) if self._limits else Spent()
        self.stopped_at: float | None = None
        """When it was found to be spent while steps ran, in seconds since 1970."""
        self._stopped_by = ""

    def __call__(self, progress: Progress) -> None:
        self._watcher(progress)
        if self.stopped_at is None and (limit := self.limit):
            self.stopped_at, self._stopped_by = self._events.now(), limit
            self._stop.set()

    @property
    def spent(self) -> Spent:
        """By all runs with the store, this one included."""
        gpu_seconds, cpu_seconds = self._events.held()
        return self._before + Spent(gpu_seconds / 3600, cpu_seconds / 3600)

    @property
    def limit(self) -> str:
        """The limit of the budget that is reached; empty where none is."""
        if not self._limits:
            return ""
        spent = self.spent
        return next((n for n, most in self._limits.items() if spent.by(n, self._plan) >= most), "")

    def check(self, demands: Sequence[Demand]) -> None:
        """Refuses trainings once the budget is spent.

        Raises:
            BudgetError: saying what was spent.
        """
        if demands and (limit := self.limit):
            raise self._error(limit, [])

    def check_steps(self, requests: Sequence[StepRequest]) -> None:
        """Refuses steps with resources of their own, training and scoring, once the budget is spent.

        Raises:
            BudgetError: saying what was spent.
        """
        if any(request.group is not None for request in requests) and (limit := self.limit):
            raise self._error(limit, requests)

    def stopped(self, unfinished: Sequence[StepRequest]) -> BudgetError:
        """The error of a run that was stopped for it, once all is saved."""
        assert self.stopped_at is not None
        self._events.add_stop(self.stopped_at, "the plan's budget is spent")
        return self._error(self._stopped_by, unfinished)

    def _error(self, limit: str, requests: Sequence[StepRequest]) -> BudgetError:
        points = saved_points(requests, self._ledger)
        return BudgetError(
            "the plan's budget is spent: everything is saved, and nothing more is started",
            found=_told(limit, self.spent, self._plan),
            remedy=f"raise budget.{limit} and run the same command: it goes on"
            + (f", {points}" if points else " from here"),
        )


class WorkersWithinBudget:
    """The workers' port, which trains and scores nothing once the budget is spent."""

    def __init__(self, workers: Workers, budget: Budget) -> None:
        self._workers, self._budget = workers, budget

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Nothing gets ready that could not be paid for."""
        if not self._budget.limit:
            self._workers.get_ready(trainings)

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        self._budget.check_steps(requests)
        left = {request.ref: request for request in requests}
        try:
            with closing(self._workers.run(requests)) as steps:
                for request, outcome in steps:
                    left.pop(request.ref, None)
                    yield request, outcome
        except Stopped as exc:
            if self._budget.stopped_at is None:
                raise
            raise self._budget.stopped(list(left.values())) from exc


def _told(limit: str, spent: Spent, plan: Plan) -> str:
    return f"{spent.by(limit, plan):,.4g} of {limits(plan)[limit]:,.4g} is spent (budget.{limit})"
