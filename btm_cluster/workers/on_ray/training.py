"""Trainings on the cluster, one after another: an actor that runs Ray Train, in its own process or over a group of
workers.

A group of one runs in Train's local mode: the actor holds the GPU (a fraction will do) and Ray restarts it. A
larger group has a placement group of its own, the actor holds nothing, and Train restarts the workers. Either
way a restarted training goes on from its last checkpoint in the store.
"""

import gc
import hashlib
import logging
import os
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from btm_cluster.driver.capacity import bundle
from btm_cluster.errors import BtmError, Stopped, TrainingError, UserError
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import Resources, ScoreRequest, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.steps.registry import function_of, quick_imports
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers.on_ray.progress import Process, RayControl, StopPoll
from btm_cluster.workers.on_ray.spans import Span, Worked, work
from btm_cluster.workers.on_ray.supervision import LOADING, STARTING, WARMING_UP

log = logging.getLogger(__name__)


PLACE_SECONDS = 600.0
"""How long a trainer that is alone trains one model after another. Then its place goes to whoever Ray gives it, which
may be another driver; a start in ten minutes costs little."""


class Trainer:
    """Trains a model, and then perhaps others. `stop` and `stopping` answer while it does."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._has_trained = False

    def train(self, request: TrainRequest, store: str, retries: int, board: Any) -> Worked:
        """The committed model."""
        began = time.time()
        if self._has_trained:
            _drop_compiled_code()
            _make_room()
        self._has_trained = True
        control = RayControl(board, self._stop.is_set)
        control.report(Progress(request.label, STARTING))
        if request.how.workers == 1:  # a group's workers may still wait for their place
            control.begin(request.ref)
        board.enter.remote(request.label, Process.this())
        with quick_imports():
            from ray.train.torch import TorchTrainer  # `ray.train` here and below; drivers have no use for it

        if request.how.workers == 1:

            def loop() -> Worked | BtmError:
                return _step(request, store, control, began)
        else:
            trainer = ray.get_runtime_context().current_actor

            def loop() -> Worked | BtmError:
                is_to_go = ray.train.get_preemption_info  # None in Train's local mode, so only groups ask
                board.enter.remote(request.label, Process.this())
                control = RayControl(board, StopPoll(trainer), lambda: is_to_go() is not None)
                if ray.train.get_context().get_world_rank() == 0:
                    control.begin(request.ref)
                return _step(request, store, control, time.time())

        # Ray Train keeps notes of a run there, which nobody needs afterwards.
        with scratch_folder() as folder:
            run_config = _run_config(request, retries, folder)
            result = TorchTrainer(loop, scaling_config=_scaling(request.how), run_config=run_config).fit()
        if isinstance(result.return_value, BtmError):
            raise result.return_value
        if not isinstance(result.return_value, Worked):
            raise TrainingError(f"{request.label}: Ray Train ended without a model", found=str(result))
        if request.how.workers == 1:
            _make_room()
        return self._told(result.return_value)

    def warm_up(self, request: TrainRequest, board: Any) -> None:
        """Gets this process ready to train, before its inputs are there.

        A fault is left for the training to meet.
        """
        began = time.time()
        board.enter.remote(request.label, Process.this())
        RayControl(board, lambda: False).report(Progress(request.label, WARMING_UP))
        with quick_imports():
            import_module("ray.train.torch")
            function_of(TrainRequest)
            from btm_cluster.steps.warm_up import warm_up

        try:
            warm_up(request)
        except Exception:
            log.warning("%s: its process could not be warmed up", request.label, exc_info=True)
        board.warmed_up.remote(request.ref, Span.since(began))

    def score(self, batch: Sequence[ScoreRequest], store: str, board: Any) -> Worked:
        """Scores texts under a model, first of all the one that this process has
        trained: it need not start anew for that."""
        with RayControl(board, lambda: False) as control:
            worked = work(batch, store, control)
        _make_room()
        return self._told(worked)

    def _told(self, worked: Worked) -> Worked:
        """The outcome, with whether another model may be trained here. An actor that was started anew has had some
        of its restarts: another training would have fewer than the plan says."""
        with warnings.catch_warnings():
            # Ray 2.60 asks itself in a way that it deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            is_first = not ray.get_runtime_context().was_current_actor_reconstructed
        return replace(worked, may_train_on=is_first and time.monotonic() - self._began < PLACE_SECONDS)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Save at the next update, and stop."""
        self._stop.set()

    @ray.method(concurrency_group="control")
    def stopping(self) -> bool:
        """Whether `stop` was called: the workers of a group ask."""
        return self._stop.is_set()


TrainerActor: Any = ray.remote(concurrency_groups={"control": 2})(Trainer)


def _make_room() -> None:
    """Frees what was held for the last model: this process may be idle for a while."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _drop_compiled_code() -> None:
    """Forgets what was compiled, and CUDA graphs with their memory: torch compiles a function for a few shapes, and
    then no more. What lies on the disk is found again."""
    import torch

    torch.compiler.reset()


def _step(request: TrainRequest, store: str, control: RayControl, began: float) -> Worked | BtmError:
    """The train loop of one worker; in a group, the process group was set up by Ray Train.

    What trying again cannot mend is returned and not raised, since Train tries again whatever is raised.
    """
    train = function_of(TrainRequest)
    # Raises where Train is not in charge: no training runs outside it.
    rank = ray.train.get_context().get_world_rank()
    try:
        with control:
            if rank == 0:
                # Its turn has come: a group may wait for it long.
                control.report(Progress(request.label, LOADING))
            model: Artifact = train(request, Ledger.open(store), control)
            return Worked([model], [Span.since(began)])
    except (UserError, Stopped, TrainingError) as exc:
        return exc


def trainer_name(request: TrainRequest, store: str) -> str:
    """The name on the cluster of a model that is trained, and of the actor that is started for it."""
    in_store = hashlib.sha256(store.encode()).hexdigest()[:6]
    return f"{request.role}-{request.label}-{request.ref.identity[:8]}-{in_store}"


def trainer_options(request: TrainRequest, store: str, retries: int) -> dict[str, Any]:
    """Options of the actor: its name in the dashboard, what it holds, how often it is restarted."""
    alone = request.how.workers == 1
    held = bundle(request.how) if alone else {"CPU": 0.0}
    return {
        "name": trainer_name(request, store),
        "num_cpus": held["CPU"],
        "num_gpus": held.get("GPU", 0.0),
        "max_restarts": retries,
        # One is spent on each call while a lost node is not yet known to be lost; restarts are the limit.
        "max_task_retries": -1,
        # Without an environment of its own the actor gets a process that Ray has ready.
        "runtime_env": {} if alone else {"env_vars": _train_variables()},
    }


def _train_variables() -> dict[str, str]:
    """Ray Train's settings: the driver has them (`lazily.py`), the cluster's nodes do
    not, and Train reads them where it runs."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}


def _scaling(how: Resources) -> "ray.train.ScalingConfig":
    if how.workers == 1:
        return ray.train.ScalingConfig(num_workers=0, use_gpu=how.gpus_per_worker > 0)
    return ray.train.ScalingConfig(
        num_workers=how.workers, use_gpu=how.gpus_per_worker > 0, resources_per_worker=bundle(how)
    )


def _run_config(request: TrainRequest, retries: int, folder: Path) -> "ray.train.RunConfig":
    # A name used before would resume that run's state; ours lives in the store.
    name = f"{request.role}-{request.label}-{request.ref.identity[:8]}-{uuid.uuid4().hex[:6]}"
    return ray.train.RunConfig(
        name=name,
        storage_path=str(folder),
        failure_config=ray.train.FailureConfig(max_failures=retries),
    )
