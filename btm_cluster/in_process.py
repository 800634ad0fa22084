"""The workers in this process: one step after the other, for debugging and for machines without Ray."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from btm_cluster.checks import check_compiler, usable_cpus
from btm_cluster.errors import BtmError, DivergedError, Stopped, UserError
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.requests import (
    AverageRequest,
    MixRequest,
    PrepareRequest,
    Request,
    ScoreRequest,
    SoupRequest,
    TrainRequest,
)
from btm_cluster.room import Ask, ask_of, no_room
from btm_cluster.steps.average import average
from btm_cluster.steps.mix import mix
from btm_cluster.steps.prepare import prepare
from btm_cluster.steps.score import score
from btm_cluster.steps.soup import soup
from btm_cluster.steps.train import train
from btm_cluster.stopping import stopped
from btm_cluster.workers import Control, Failure, Outcome, Progress, Watcher

AnyRequest = TypeVar("AnyRequest", bound=Request)


class LocalControl:
    """A step's line to its driver, in one process."""

    def __init__(self, watcher: Watcher, stop: threading.Event) -> None:
        self._watcher, self._stop = watcher, stop

    def report(self, progress: Progress) -> None:
        self._watcher(progress)

    def stopping(self) -> bool:
        return self._stop.is_set()

    def saving(self) -> bool:
        return False


class InProcess:
    """The port, without a cluster: one worker, on the GPU or the CPUs of this machine."""

    def __init__(self, ledger: Ledger, control: Control) -> None:
        self._ledger, self._control = ledger, control

    def check_room(self, asks: Sequence[Ask]) -> None:
        """Any number of CPUs will do, since threads can share them: the same model, later."""
        check_compiler(asks)
        for ask in asks:
            gpus = math.ceil(ask.how.workers * ask.how.gpus_per_worker)
            if gpus > (usable := torch.cuda.device_count()):
                node = {"CPU": float(usable_cpus()), "GPU": float(usable)}
                raise no_room(ask, "this machine", [node], "run it on one that has them")

    def prepare(self, requests: Sequence[PrepareRequest]) -> list[Outcome]:
        return [self._attempt(request, lambda r: prepare(r, self._ledger, self._control)) for request in requests]

    def train(self, requests: Sequence[TrainRequest]) -> list[Outcome]:
        self.check_room([ask_of(request) for request in requests])
        return [self._attempt(request, lambda r: train(r, self._ledger, self._control)) for request in requests]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        return [self._attempt(request, lambda r: score([r], self._ledger, self._control)[0]) for request in requests]

    def mix(self, requests: Sequence[MixRequest]) -> list[Outcome]:
        return [self._attempt(request, lambda r: mix(r, self._ledger, self._control)) for request in requests]

    def average(self, requests: Sequence[AverageRequest]) -> list[Outcome]:
        return [self._attempt(request, lambda r: average(r, self._ledger, self._control)) for request in requests]

    def soup(self, requests: Sequence[SoupRequest]) -> list[Outcome]:
        return [self._attempt(request, lambda r: soup(r, self._ledger, self._control)) for request in requests]

    def _attempt(self, request: AnyRequest, step: Callable[[AnyRequest], Artifact]) -> Outcome:
        if self._control.stopping():
            raise stopped()
        try:
            return step(request)
        except (UserError, Stopped):
            raise
        except BtmError as exc:
            return Failure(request.label, 1, "in this process", str(exc), isinstance(exc, DivergedError))
