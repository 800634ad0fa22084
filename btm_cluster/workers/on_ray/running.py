"""A batch of requests under way on the cluster."""

import time
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any

import ray

from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.workers.on_ray.supervision import StepState

EARLY_SECONDS = 60.0
"""How long before its inputs are there the process of a training is started:
it imports, opens a GPU and compiles."""


@dataclass
class Running:
    """A batch under way: its result to come, and the trainer actor where it has one."""

    batch: list[StepRequest]
    result: Any
    trainer: Any = None
    how: Resources | None = None
    """Resources that the trainer holds."""
    process: str = "task"
    """The actor's name, or `task`."""
    waits_for: InitVar[str] = ""
    """Capacity that the cluster lacked when this was submitted."""
    state: StepState = field(init=False)
    seconds_left: float | None = None
    """As a training last said."""
    started: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.time)
    """In seconds since 1970."""
    attempt: int = 1
    has_place: bool = False
    """Whether its process is known to be there."""
    may_train_on: bool = False
    """Whether the trainer may train another model after this."""

    def __post_init__(self, waits_for: str) -> None:
        is_training = self.trainer is not None and self.is_training
        self.state = StepState.submitted(time.monotonic(), is_training, waits_for)

    @property
    def label(self) -> str:
        """The name that progress goes by."""
        return self.batch[0].shown

    @property
    def is_training(self) -> bool:
        """Whether it is a training."""
        return isinstance(self.batch[0], TrainRequest)

    @property
    def ends_soon(self) -> bool:
        """Whether whatever follows should get ready. Steps that do not train are short."""
        return not self.is_training or (self.seconds_left is not None and self.seconds_left <= EARLY_SECONDS)

    @property
    def may_lack_a_place(self) -> bool:
        """Whether it may still wait for a place on the cluster.

        A trainer that scores has one. A group's actor speaks before its workers have theirs.
        """
        if self.trainer is not None and not self.is_training:
            return False
        is_alone = self.how is not None and self.how.workers == 1
        return self.state.phase == "queued" and not (is_alone and self.has_place)

    def end(self) -> None:
        """Kills the trainer, or cancels the task."""
        if self.trainer is not None:
            end_trainer(self.trainer, self.result)
        else:
            ray.cancel(self.result, force=False)


def end_trainer(trainer: Any, result: Any) -> None:
    """Kills an actor whose call has no result yet. If that were not cancelled, Ray would print that it tries again."""
    ray.cancel(result)
    ray.kill(trainer)


def would_hold_up_a_training(request: StepRequest, running: Iterable[Running]) -> bool:
    """Whether a step with GPUs might get them before a training that waits for its own, on a cluster that has as many.

    Ray places whatever fits. A group that waits until several GPUs are free would wait as long as anything small is
    submitted.
    """
    if isinstance(request, TrainRequest) or request.group is None or not request.group.gpus_per_worker:
        return False
    trainings = (one for one in running if one.is_training and one.trainer is not None)
    return any(one.may_lack_a_place and not one.state.waits_for for one in trainings)
