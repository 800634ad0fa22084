"""Curves of every training: to TensorBoard files in the store, and to Weights & Biases or MLflow where the plan asks.

The driver is the one writer, from the signs of life that it sees anyway, so that no node needs a service's key.
No training waits for a curve, and none fails for one.
"""

import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from btm_cluster.errors import StoreError, UserError
from btm_cluster.plan import Plan
from btm_cluster.records import LOGS
from btm_cluster.requests.progress import Progress, Watcher
from btm_cluster.storage import Storage
from btm_cluster.storage.scratch import scratch_folder

log = logging.getLogger(__name__)
STORE_SECONDS = 60.0
"""Between two times that TensorBoard's files are stored."""
LAST_SECONDS = 30.0
"""How long the end of a run waits for them, where the store is out."""
FAILED = object()


class Tracker(Protocol):
    """A place where curves go."""

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        """Adds a point to the curves of a training."""

    def close(self, ended_well: bool) -> None:
        """Ends the run."""


class Tracking:
    """A watcher that passes on what it sees, and tracks it. Nothing is begun before there is a point to track.

    Raises:
        UserError: the plan asks for a service whose package is not installed.
    """

    def __init__(self, plan: Plan, storage: Storage, watcher: Watcher) -> None:
        self._watcher, self._said = watcher, dict[str, int]()
        check_tracking(plan)
        self._makers: list[Callable[[], Tracker]] = [lambda: TensorBoard(storage)]
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
        values = points_of(progress)
        if not values or self._said.get(progress.label) == progress.update:
            return
        self._said[progress.label] = progress.update
        if self._trackers is None:
            made = [_attempt(None, make) for make in self._makers]
            self._trackers = [tracker for tracker in made if tracker is not FAILED]
        for tracker in list(self._trackers):
            if _attempt(tracker, partial(tracker.log, progress.label, progress.update, values)) is FAILED:
                self._trackers.remove(tracker)


def points_of(progress: Progress) -> dict[str, float]:
    """What a sign of life adds to curves; nothing outside of training."""
    if progress.loss is None:
        return {}
    said = {
        "loss": progress.loss,
        "tokens_per_second": progress.tokens_per_second,
        "mfu": progress.mfu,
        "checkpoint_stall_seconds": progress.stall_seconds,
        "checkpoint_upload_seconds": progress.upload_seconds,
    }
    return {name: value for name, value in said.items() if value is not None}


def _attempt(tracker: Tracker | None, act: Callable[[], Any]) -> Any:
    """What `act` returns, or FAILED after a warning: services raise what they like, and a run goes on without its curves."""
    try:
        return act()
    except Exception as exc:
        log.warning("%s is given up for this run: %s", type(tracker).__name__ if tracker else "a tracker", exc)
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


class TensorBoard:
    """Event files, a folder for each training, written here and stored under `logs/` now and then."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._run = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        self._writers: dict[str, Any] = {}
        self._stored: dict[Path, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._store_now_and_then, daemon=True, name="curves")
        self._thread.start()

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        if label not in self._writers:
            from tensorboardX import SummaryWriter

            self._writers[label] = SummaryWriter(str(self._folder / label), write_to_disk=True)
        for name, value in values.items():
            self._writers[label].add_scalar(name, value, update)

    def close(self, ended_well: bool) -> None:  # noqa: ARG002 - a curve's end says it
        self._ended.set()
        self._thread.join(LAST_SECONDS)
        self._scratch.close()

    def _store_now_and_then(self) -> None:
        while not self._ended.wait(STORE_SECONDS):
            for writer in list(self._writers.values()):
                writer.flush()
            self._store()
        for writer in self._writers.values():
            writer.close()  # only this waits for points that are still on their way to the file
        self._store()

    def _store(self) -> None:
        for file in self._folder.rglob("*"):
            if file.is_file() and self._stored.get(file) != file.stat().st_size:
                size = file.stat().st_size
                try:
                    self._storage.upload(f"{LOGS}{self._run}/{file.relative_to(self._folder).as_posix()}", file)
                except StoreError as exc:
                    log.warning("curves were not stored, the next time tries again: %s", exc)
                    return
                self._stored[file] = size


class Wandb:
    """A run in Weights & Biases, with a group of curves for each training over its own updates."""

    def __init__(self, plan: Plan) -> None:
        import wandb

        asked = plan.tracking.wandb
        assert asked is not None
        config = plan.model_dump(mode="json")
        self._run = wandb.init(project=asked.project, entity=asked.entity, name=plan.name, config=config)
        self._known: set[str] = set()

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        if label not in self._known:
            self._known.add(label)
            self._run.define_metric(f"{label}/*", step_metric=f"{label}/update")
        named = {f"{label}/{name}": value for name, value in values.items()}
        self._run.log(named | {f"{label}/update": update})

    def close(self, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)


class Mlflow:
    """A run in MLflow; a training's curves begin with its name."""

    def __init__(self, plan: Plan) -> None:
        import mlflow

        asked = plan.tracking.mlflow
        assert asked is not None
        self._client = mlflow.MlflowClient(tracking_uri=asked.uri)
        found = self._client.get_experiment_by_name(asked.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(asked.experiment)
        self._run = self._client.create_run(experiment, run_name=plan.name).info.run_id
        for name, value in {"store": plan.store, **plan.training.model_dump(mode="json")}.items():
            self._client.log_param(self._run, name, value)

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, f"{label}/{name}", value, step=update, synchronous=False)

    def close(self, ended_well: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if ended_well else "FAILED")
