"""Signs of life: from a step in some process of the cluster to its driver."""

import socket
import time
from collections import Counter as Counts
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import ray

from btm_cluster.storage.requests import Requests, take_requests
from btm_cluster.workers import Progress

STOP_POLL_SECONDS = 1.0
STARTING = "starting"


@dataclass(frozen=True)
class News:
    """What a board heard since it was last asked."""

    progress: list[Progress]
    """The newest of each label."""
    attempts: dict[str, int]
    """How often each of these labels was started."""
    requests: Requests
    """What the steps asked of the store."""


class ProgressBoard:
    """Holds the newest progress of each label until the driver takes it, and how often and where it was started."""

    def __init__(self) -> None:
        self._fresh: dict[str, Progress] = {}
        self._attempts: Counts[str] = Counts()
        self._host: dict[str, str] = {}
        self._requests: Counts[tuple[str, str]] = Counts()

    def put(self, progress: Progress, host: str) -> None:
        self._fresh[progress.label] = progress
        self._attempts[progress.label] += progress.phase == STARTING
        self._host[progress.label] = host

    def count(self, requests: Requests) -> None:
        self._requests.update(requests)

    def story(self, label: str) -> tuple[int, str]:
        """How often it was started, and the host that was last heard of."""
        return self._attempts[label], self._host.get(label, "")

    def take(self) -> News:
        attempts = {label: self._attempts[label] for label in self._fresh}
        taken = News(list(self._fresh.values()), attempts, dict(self._requests))
        self._fresh = {}
        self._requests.clear()
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

    def stopping(self) -> bool:
        return self._asked_to_stop()

    def saving(self) -> bool:
        return self._told_to_save()

    def _count(self) -> None:
        requests = take_requests()
        if requests:
            self._board.count.remote(requests)


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
