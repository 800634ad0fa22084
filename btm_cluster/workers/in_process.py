"""The workers in this process: one step after the other, for debugging and for machines without Ray."""

import math
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from btm_cluster.driver.capacity import Demand, demand_of, no_capacity
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.run_events import RunEvents, cause_of
from btm_cluster.errors import BtmError, DivergedError, Stopped, UserError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.timelines import Node
from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.requests.progress import Control, Progress, Watcher
from btm_cluster.steps.registry import run_batch
from btm_cluster.stopping import stopped
from btm_cluster.workers.disk_and_memory import check_this_machine
from btm_cluster.workers.machine import check_compiler, usable_cpus
from btm_cluster.workers.pending import Pending
from btm_cluster.workers.step_events import event_of

HERE, PROCESS = "here", "in process"
"""This machine and this process, in a run's timeline."""


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

    def __init__(self, ledger: Ledger, control: Control, events: RunEvents | None = None) -> None:
        self._ledger, self._control, self._events = ledger, control, events or RunEvents()

    def check_capacity(self, demands: Sequence[Demand]) -> None:
        """Any number of CPUs will do, since threads can share them: the same model, later."""
        check_this_machine(demands)
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
        here = Node(name=socket.gethostname(), gpus=torch.cuda.device_count(), cpus=usable_cpus())
        self._events.add_node(HERE, here)
        pending = Pending(requests)
        while batch := pending.next_batch():
            for request, outcome in self._run(batch, pending):
                yield request, outcome
                yield from pending.finish(request, outcome)

    def _run(self, batch: Sequence[StepRequest], pending: Pending) -> Iterator[tuple[StepRequest, Outcome]]:
        """The requests of a batch with their outcomes. What one fails of, those after it fail of, unless they are
        to be tried alone."""
        artifacts = run_batch(batch, self._ledger, self._control)
        for done, request in enumerate(batch):
            if self._control.stopping():
                raise stopped()
            try:
                with self._told(request):
                    artifact = next(artifacts)
            except (UserError, Stopped):
                raise
            except BtmError as exc:
                if pending.take_apart(batch[done:]):
                    return
                cause = (1, "in this process", str(exc), isinstance(exc, DivergedError))
                yield from ((one, Failure(one.label, *cause)) for one in batch[done:])
                return
            yield request, artifact

    @contextmanager
    def _told(self, request: StepRequest) -> Iterator[None]:
        """Tells the run's events of a step: while it is under way, and how it ended."""
        began, how = self._events.now(), request.group
        gpus = how.workers * how.gpus_per_worker if how else 0.0
        cpus = how.workers * how.cpus_per_worker if how else 1.0
        step = event_of(request, "step", began, began, node=HERE, process=PROCESS, gpus=gpus, cpus=cpus)
        self._events.begin(request.ref, step)
        failure: dict[str, Any] = {}
        try:
            yield
        except Exception as exc:
            if not isinstance(exc, Stopped):
                failure = {"what": "failure", "cause": cause_of(str(exc))}
            raise
        finally:
            if (over := self._events.end(request.ref)) is not None:
                self._events.add(over.model_copy(update=failure))
