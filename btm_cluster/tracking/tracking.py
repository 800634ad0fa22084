"""Curves of every training: to TensorBoard files in the store, and to Weights &
Biases or MLflow where the plan asks.

The driver is the one writer, from the progress reports that it sees anyway, so that no node needs a service's
key. No training waits for a curve, and none fails for one.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from btm_cluster.errors import UserError
from btm_cluster.ledger.timelines import new_run_name
from btm_cluster.plan import Plan
from btm_cluster.requests.progress import Progress, Watcher
from btm_cluster.storage import Storage
from btm_cluster.tracking.mlflow import Mlflow
from btm_cluster.tracking.tensorboard import TensorBoard
from btm_cluster.tracking.wandb import Wandb

log = logging.getLogger(__name__)
FAILED = object()


class Tracker(Protocol):
    """A place where curves go."""

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        """Adds a point to the curves of a training."""

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None) -> None:
        """Adds the run's outcome: rows of the verdict, all of the same columns, and the report, a local file."""

    def close(self, ended_well: bool) -> None:
        """Ends the run."""


class Tracking:
    """A watcher that passes on what it sees, and tracks it.

    Nothing is begun before there is a point to track; a run that trains nothing is not tracked. `run` is its
    name in the store.

    Raises:
        UserError: the plan asks for a service whose package is not installed.
    """

    def __init__(self, plan: Plan, storage: Storage, watcher: Watcher, run: str | None = None) -> None:
        self._watcher, self._said = watcher, dict[str, int]()
        self._said_of_development: dict[str, int] = {}
        check_tracking(plan)
        self._makers: list[Callable[[], Tracker]] = [lambda: TensorBoard(storage, run or new_run_name())]
        if plan.tracking.wandb is not None:
            self._makers.append(lambda: Wandb(plan))
        if plan.tracking.mlflow is not None:
            self._makers.append(lambda: Mlflow(plan))
        self._trackers: list[Tracker] | None = None

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers or ():
            _attempt(tracker, partial(tracker.close, kind is None))

    def __call__(self, progress: Progress) -> None:
        self._watcher(progress)
        label, update, values = progress.label, progress.done, points_of(progress)
        if not values or self._said.get(label) == update:
            return
        self._said[label] = update
        if self._trackers is None:
            made = [_attempt(None, make) for make in self._makers]
            self._trackers = [tracker for tracker in made if tracker is not FAILED]
        self._to_all(lambda tracker: tracker.log(label, update, values))
        looked, loss = progress.development_update, progress.development_loss
        if looked is not None and loss is not None and self._said_of_development.get(label) != looked:
            self._said_of_development[label] = looked
            self._to_all(lambda tracker: tracker.log(label, looked, {"development_loss": loss}))

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None = None) -> None:
        """Passes the outcome of a run that has trained something on."""
        self._to_all(lambda tracker: tracker.finish(verdict, report))

    def _to_all(self, act: Callable[[Tracker], None]) -> None:
        """Does something with each tracker; those that fail are given up."""
        for tracker in list(self._trackers or ()):
            if _attempt(tracker, partial(act, tracker)) is FAILED and self._trackers is not None:
                self._trackers.remove(tracker)


def points_of(progress: Progress) -> dict[str, float]:
    """The points that a progress report adds to curves; none outside of training."""
    if progress.loss is None:
        return {}
    said = {
        "loss": progress.loss,
        "learning_rate": progress.learning_rate,
        "gradient_norm": progress.gradient_norm,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens_per_second,
        "mfu": progress.mfu,
        "checkpoint_stall_seconds": progress.stall_seconds,
        "checkpoint_upload_seconds": progress.upload_seconds,
    }
    return {name: float(value) for name, value in said.items() if value is not None}


def _attempt(tracker: Tracker | None, act: Callable[[], Any]) -> Any:
    """The result of `act`, or FAILED after a warning: services raise anything, and
    a run goes on without its curves."""
    try:
        return act()
    except Exception as exc:
        log.warning(
            "%s is given up for this run: %s", type(tracker).__name__ if tracker else "a tracker", exc
        )
        return FAILED


def check_tracking(plan: Plan) -> None:
    """Refuses a plan that asks for a service whose package is not there.

    Raises:
        UserError: naming it, and how to install it.
    """
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        if getattr(plan.tracking, name) is None:
            continue
        try:
            importlib.import_module(name)
        except ImportError as exc:
            raise UserError(
                f"tracking.{name} is asked for, and cannot be imported",
                found=str(exc),
                remedy=f"pip install {package} where the driver runs, or leave it out of the plan",
            ) from exc
