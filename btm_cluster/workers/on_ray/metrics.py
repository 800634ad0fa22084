"""Metrics of a run for Ray, and by it for Prometheus and Grafana (deploy/grafana).

The driver is the only writer, so that series end with the run and none stands twice. Labels: the store, a
training's name and its phase (seed, expert, transformer-lm); none of them grows with time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ray.util.metrics import Counter, Gauge

from btm_cluster.forest import Forest
from btm_cluster.requests import TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.storage.store_calls import StoreCalls

_OF_TRAINING = {
    "updates": "update that the training has reached",
    "updates_wanted": "update at which it ends",
    "loss": "training loss, nats per token",
    "tokens_per_second": "tokens trained on per second",
    "mfu": "share of the GPUs' arithmetic that the model uses",
    "checkpoint_stall_seconds": "seconds that training stalled for its last checkpoint",
    "checkpoint_upload_seconds": "time that its last checkpoint took to be stored",
    "seconds_since_update": "time since the last progress report, while it trains",
    "queue_wait_seconds": "time that it waited, or waits, for resources",
    "waiting": "1 while it waits for resources",
    "retries": "times that it was started again",
}
TRAINING_TAGS = ("store", "expert", "phase")
RENEW_SECONDS = 1.0
"""Ray forgets a gauge that is not set again within two of its reports."""
LINGER_SECONDS = 60.0
"""A training's series go on for so long after its end, so that each scrape sees the last values."""


@dataclass
class Watched:
    """One training, as the driver sees it. Times in seconds of one clock."""

    phase: str
    asked: float
    begun: float | None = None
    heard: float = 0.0
    ended: float | None = None
    said: dict[str, float] = field(default_factory=lambda: {"retries": 0.0})
    """The numbers of its newest progress reports."""

    def values(self, now: float) -> dict[str, float]:
        """All that is to be told of it; nothing some time after its end."""
        if self.ended is not None and now - self.ended > LINGER_SECONDS:
            return {}
        trains = self.begun is not None and self.ended is None
        waited_until = self.begun if self.begun is not None else self.ended if self.ended is not None else now
        return self.said | {
            "waiting": float(self.begun is None and self.ended is None),
            "queue_wait_seconds": waited_until - self.asked,
            "seconds_since_update": now - self.heard if trains else 0.0,
        }


def shown(progress: Progress) -> dict[str, float]:
    """The numbers of a progress report."""
    said = {
        "updates": progress.done if progress.loss is not None else None,
        "updates_wanted": progress.total if progress.loss is not None else None,
        "loss": progress.loss,
        "tokens_per_second": progress.tokens_per_second,
        "mfu": progress.mfu,
        "checkpoint_stall_seconds": progress.stall_seconds,
        "checkpoint_upload_seconds": progress.upload_seconds,
    }
    return {name: float(value) for name, value in said.items() if value is not None}


class Metrics:
    """Metrics of one driver and one store."""

    def __init__(self, store: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = {"store": store.partition("?")[0]}, clock
        self._watched: dict[str, Watched] = {}
        self._forest: Forest | None = None
        self._next = 0.0
        self._gauges = {
            name: Gauge(f"btm_{name}", description, tag_keys=TRAINING_TAGS)
            for name, description in _OF_TRAINING.items()
        }
        self._tokens = Counter("btm_tokens", "tokens trained on", tag_keys=TRAINING_TAGS)
        self._steps = Counter("btm_steps", "steps that ended", tag_keys=("store", "step", "outcome"))
        self._store_calls = Counter(
            "btm_store_requests", "operations on the store", tag_keys=("store", "verb", "outcome")
        )
        self._version = Gauge("btm_forest_version", "newest version of the forest", tag_keys=("store",))
        self._experts = Gauge("btm_forest_experts", "experts in the newest version", tag_keys=("store",))

    def asked(self, request: TrainRequest) -> None:
        """A training was submitted to the cluster."""
        self._watched[request.label] = Watched(request.role, self._clock())

    def heard(self, progress: Progress, attempts: int) -> None:
        """A progress report; `attempts`: how often that training was started."""
        one = self._watched.get(progress.label)
        if one is None or one.ended is not None:  # no training
            return
        before, one.heard = one.heard, self._clock()
        if one.begun is None:
            one.begun = before = one.heard
        one.said |= shown(progress) | {"retries": float(max(attempts - 1, 0))}
        tokens = (progress.tokens_per_second or 0.0) * (one.heard - before)
        if tokens > 0:
            self._tokens.inc(tokens, self._tags(progress.label))

    def ended(self, label: str, step: str, failed: bool) -> None:
        """A step came to its end."""
        self._steps.inc(1, self._store | {"step": step, "outcome": "failed" if failed else "done"})
        if label in self._watched and step == "train":
            self._watched[label].ended = self._clock()

    def count_store_calls(self, store_calls: StoreCalls) -> None:
        """Counts the store calls of some process of this run."""
        for (verb, outcome), count in store_calls.items():
            self._store_calls.inc(count, self._store | {"verb": verb, "outcome": outcome})

    def stands(self, forest: Forest | None) -> None:
        """The forest as it is now."""
        self._forest = forest

    def renew(self) -> None:
        """Sets every gauge again, once a second."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + RENEW_SECONDS
        for label, one in self._watched.items():
            for name, value in one.values(now).items():
                self._gauges[name].set(value, self._tags(label))
        if self._forest is not None:
            self._version.set(self._forest.version, self._store)
            self._experts.set(len(self._forest.experts), self._store)

    def _tags(self, label: str) -> dict[str, str]:
        return self._store | {"expert": label, "phase": self._watched[label].phase}
