"""Trainers that have nothing to do: what each of them holds, and when they are ended."""

import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from btm_cluster.driver.capacity import bundle
from btm_cluster.requests import Resources

IDLE_SECONDS = 60.0
"""How long a trainer is kept that has nothing to do yet: others may want its place on the cluster."""


@dataclass(frozen=True)
class Idle:
    """A trainer that has nothing to do, what it holds, and since when on the monotonic clock."""

    actor: Any
    how: Resources
    process: str
    since: float
    may_train: bool

    @property
    def is_slow_to_start(self) -> bool:
        """Whether another like it would take long until it trains: it has a GPU, which is opened and compiled for."""
        return self.may_train and self.how.gpus_per_worker > 0


class IdleTrainers:
    """The idle trainers of a driver, those that are longest idle first."""

    def __init__(self, cpus: float) -> None:
        self._cpus = cpus
        self._trainers: list[Idle] = []
        self._timer: threading.Timer | None = None

    def __iter__(self) -> Iterator[Idle]:
        return iter(list(self._trainers))

    def __len__(self) -> int:
        return len(self._trainers)

    def add(self, idle: Idle) -> None:
        self._trainers.append(idle)

    def remove(self, idle: Idle) -> None:
        self._trainers.remove(idle)

    def take(self, how: Resources) -> Idle | None:
        """One that may train and holds what a training asks for, no more and no less."""
        found = (one for one in self._trainers if one.may_train and bundle(one.how) == bundle(how))
        idle = next(found, None) if how.workers == 1 else None
        if idle is not None:
            self._trainers.remove(idle)
        return idle

    def keep(self, to_score: int) -> None:
        """Keeps so many for the scores to come, and those that are slow to start; ends all others, and whatever was idle
        for too long."""
        late = time.monotonic() - IDLE_SECONDS
        young = [one for one in self._trainers if one.since > late]
        kept = [one for number, one in enumerate(young) if number < to_score or one.is_slow_to_start]
        while sum(one.how.cpus_per_worker for one in kept) > self._cpus / 2:
            kept.pop()  # the other half is for steps of one CPU
        self.end(but=kept)

    def end(self, but: Collection[Idle] = ()) -> None:
        """Ends them, and gives their places on the cluster back."""
        for one in self._trainers:
            if one not in but:
                ray.kill(one.actor)
        self._trainers = list(but)

    def end_later(self) -> None:
        """Has a timer end them, unless it is cancelled: for the time between two calls of a driver."""
        if self._trainers:
            self._timer = threading.Timer(IDLE_SECONDS, self.end)
            self._timer.daemon = True
            self._timer.start()

    def cancel_timer(self) -> None:
        """Keeps the timer from ending them, unless it has done so."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # it may just have begun
            self._timer = None
