"""The workers in this process: one step after the other, for debugging and for machines without Ray."""

import math
import threading
from collections.abc import Generator, Iterator, Sequence

import torch

from btm_cluster.driver.capacity import Demand, demand_of, no_capacity
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.errors import BtmError, DivergedError, Stopped, UserError
from btm_cluster.ledger import Ledger
from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.requests.progress import Control, Progress, Watcher
from btm_cluster.steps.registry import run_batch
from btm_cluster.stopping import stopped
from btm_cluster.workers.machine import check_compiler, usable_cpus
from btm_cluster.workers.pending import Pending


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

    def check_capacity(self, demands: Sequence[Demand]) -> None:
        """Any number of CPUs will do, since threads can share them: the same model, later."""
        check_compiler(demands)
        for demand in demands:
            gpus = math.ceil(demand.how.workers * demand.how.gpus_per_worker)
            if gpus > (usable := torch.cuda.device_count()):
                node = {"CPU": float(usable_cpus()), "GPU": float(usable)}
                raise no_capacity(demand, "this machine", [node], "run it on one that has them")

    def at_once(self, _: Resources | None) -> int:
        """One step after the other."""
        return 1

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Nothing: there is no other process."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        self.check_capacity([demand_of(request) for request in requests if isinstance(request, TrainRequest)])
        pending = Pending(requests)
        while batch := pending.next_batch():
            for request, outcome in self._run(batch):
                yield request, outcome
                yield from pending.finish(request, outcome)

    def _run(self, batch: Sequence[StepRequest]) -> Iterator[tuple[StepRequest, Outcome]]:
        """The requests of a batch with their outcomes. What one fails of, those after it fail of."""
        artifacts = run_batch(batch, self._ledger, self._control)
        for done, request in enumerate(batch):
            if self._control.stopping():
                raise stopped()
            try:
                yield request, next(artifacts)
            except (UserError, Stopped):
                raise
            except BtmError as exc:
                cause = (1, "in this process", str(exc), isinstance(exc, DivergedError))
                yield from ((one, Failure(one.label, *cause)) for one in batch[done:])
                return
