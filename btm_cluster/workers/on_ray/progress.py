"""Progress reports: from a step in some process of the cluster to its driver."""

import os
import socket
import time
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.identity import Ref
from btm_cluster.requests.progress import Progress
from btm_cluster.storage.store_calls import StoreCalls, take_store_calls
from btm_cluster.workers.on_ray.spans import Begun, Span
from btm_cluster.workers.on_ray.supervision import STARTING

STOP_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class News:
    """Progress reports since the board was last asked."""

    progress: list[Progress]
    """The newest of each label."""
    attempts: dict[str, int]
    """How often each of these labels was started."""
    store_calls: StoreCalls
    """Store calls of the steps."""
    begun: list[Begun]
    """Batches that processes have begun with."""
    warm_ups: list[tuple[Ref, Span]]
    """When processes got ready for trainings, before their turn."""
    clock_offsets: dict[str, float]
    """Seconds from a node's clock to this one's, at most so many: the messages' way is in it."""


@dataclass(frozen=True)
class Process:
    """A process somewhere in the cluster.

    By when it began, another that got its number later is told from it.
    """

    node: str
    number: int
    began: float

    @classmethod
    def this(cls) -> "Process":
        """The one that runs this."""
        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), psutil.Process().create_time())

    def kill(self) -> None:
        """Has a task on its node kill it; nothing happens where either is gone.

        Not by `ray.kill`: Ray 2.60 gives that up where a process takes no connection, which a stopped one
        does not.
        """
        there = NodeAffinitySchedulingStrategy(self.node, soft=False)
        _kill_here.options(scheduling_strategy=there).remote(self.number, self.began)


@ray.remote(num_cpus=0)
def _kill_here(number: int, began: float) -> None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        if process.create_time() == began:
            process.kill()


class ProgressBoard:
    """Holds the newest progress of each label until the driver takes it, and
    how often and where it was started."""

    def __init__(self) -> None:
        self._fresh: dict[str, Progress] = {}
        self._attempts: Counts[str] = Counts()
        self._host: dict[str, str] = {}
        self._processes: defaultdict[str, set[Process]] = defaultdict(set)
        self._store_calls: Counts[tuple[str, str]] = Counts()
        self._begun: list[Begun] = []
        self._warm_ups: list[tuple[Ref, Span]] = []
        self._clock_offsets: dict[str, float] = {}

    def put(self, progress: Progress, host: str) -> None:
        self._fresh[progress.label] = progress
        self._host[progress.label] = host
        if progress.phase == STARTING:
            self._attempts[progress.label] += 1
            self._processes[progress.label].clear()

    def begin(self, begun: Begun) -> None:
        """Notes that a process has begun with a batch."""
        offset = time.time() - begun.at
        self._clock_offsets[begun.node] = min(offset, self._clock_offsets.get(begun.node, offset))
        self._begun.append(begun)

    def warmed_up(self, training: Ref, span: Span) -> None:
        """Notes that a process is ready for a training."""
        self._warm_ups.append((training, span))

    def enter(self, label: str, process: Process) -> None:
        """Notes a process that works on a label, until that is started anew."""
        self._processes[label].add(process)

    def processes(self, label: str) -> set[Process]:
        """Those that work on a label."""
        return self._processes[label]

    def count(self, store_calls: StoreCalls) -> None:
        self._store_calls.update(store_calls)

    def attempts_and_host(self, label: str) -> tuple[int, str]:
        """How often it was started, and the host that was last heard of."""
        return self._attempts[label], self._host.get(label, "")

    def take(self) -> News:
        attempts = {label: self._attempts[label] for label in self._fresh}
        taken = News(
            list(self._fresh.values()),
            attempts,
            dict(self._store_calls),
            self._begun,
            self._warm_ups,
            dict(self._clock_offsets),
        )
        self._fresh, self._begun, self._warm_ups = {}, [], []
        self._store_calls.clear()
        return taken


ProgressBoardActor: Any = ray.remote(num_cpus=0)(ProgressBoard)


class RayControl:
    """A step's line to its driver: reports to the board, and asks `asked_to_stop` whether to stop.

    As a context it also tells, in the end, what the step asked of the store since its last report.
    """

    def __init__(
        self, board: Any, asked_to_stop: Callable[[], bool], told_to_save: Callable[[], bool] = lambda: False
    ) -> None:
        self._board, self._asked_to_stop, self._told_to_save = board, asked_to_stop, told_to_save

    def __enter__(self) -> "RayControl":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count()

    def report(self, progress: Progress) -> None:
        self._board.put.remote(progress, socket.gethostname())
        self._count()

    def begin(self, first: Ref) -> None:
        """Tells that this process begins with a batch, by its first request."""
        self._board.begin.remote(Begun.now(first))

    def stopping(self) -> bool:
        return self._asked_to_stop()

    def saving(self) -> bool:
        return self._told_to_save()

    def _count(self) -> None:
        store_calls = take_store_calls()
        if store_calls:
            self._board.count.remote(store_calls)


class StopPoll:
    """Asks a trainer actor, from a worker of its group, whether to stop; never waits for the answer."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._asked: Any = None
        self._next = 0.0

    def __call__(self) -> bool:
        if self._asked is not None:
            if not ray.wait([self._asked], timeout=0)[0]:
                return False
            answer, self._asked = bool(ray.get(self._asked)), None
            return answer
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + STOP_POLL_SECONDS
            self._asked = self._trainer.stopping.remote()
        return False
