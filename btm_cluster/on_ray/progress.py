"""Signs of life: from a step in some process of the cluster to the driver's display, and to Ray's metrics."""

import socket
import time
from collections import Counter as Counts
from collections.abc import Callable
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from btm_cluster.workers import Progress

STOP_POLL_SECONDS = 1.0
STARTING = "starting"


class ProgressBoard:
    """Holds the newest progress of each label until the driver takes it, and how often and where it was started."""

    def __init__(self) -> None:
        self._fresh: dict[str, Progress] = {}
        self._attempts: Counts[str] = Counts()
        self._host: dict[str, str] = {}

    def put(self, progress: Progress, host: str) -> None:
        self._fresh[progress.label] = progress
        self._attempts[progress.label] += progress.phase == STARTING
        self._host[progress.label] = host

    def story(self, label: str) -> tuple[int, str]:
        """How often it was started, and the host that was last heard of."""
        return self._attempts[label], self._host.get(label, "")

    def take(self) -> list[Progress]:
        taken, self._fresh = list(self._fresh.values()), {}
        return taken


ProgressBoardActor: Any = ray.remote(num_cpus=0)(ProgressBoard)


class RayControl:
    """A step's line to its driver: reports to the board and to metrics, and asks `asked_to_stop` whether to stop."""

    def __init__(
        self, board: Any, asked_to_stop: Callable[[], bool], told_to_save: Callable[[], bool] = lambda: False
    ) -> None:
        self._board, self._asked_to_stop, self._told_to_save = board, asked_to_stop, told_to_save
        tags = ("expert",)
        self._loss = Gauge("btm_loss", "training loss, nats per token", tag_keys=tags)
        self._updates = Gauge("btm_updates", "update that the training has reached", tag_keys=tags)
        self._rate = Gauge("btm_tokens_per_second", "tokens trained on per second", tag_keys=tags)
        self._tokens = Counter("btm_tokens", "tokens trained on", tag_keys=tags)
        self._stall = Gauge("btm_checkpoint_stall_seconds", "standstill for the last checkpoint", tag_keys=tags)
        self._upload = Gauge("btm_checkpoint_upload_seconds", "time the last checkpoint took to store", tag_keys=tags)
        self._reported = time.monotonic()

    def report(self, progress: Progress) -> None:
        self._board.put.remote(progress, socket.gethostname())
        tags = {"expert": progress.label}
        if progress.stall_seconds is not None and progress.upload_seconds is not None:
            self._stall.set(progress.stall_seconds, tags)
            self._upload.set(progress.upload_seconds, tags)
        if progress.loss is None or progress.tokens_per_second is None:
            return
        now = time.monotonic()
        self._loss.set(progress.loss, tags)
        self._updates.set(progress.update, tags)
        self._rate.set(progress.tokens_per_second, tags)
        self._tokens.inc(max(progress.tokens_per_second * (now - self._reported), 1e-9), tags)
        self._reported = now

    def stopping(self) -> bool:
        return self._asked_to_stop()

    def saving(self) -> bool:
        return self._told_to_save()


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
