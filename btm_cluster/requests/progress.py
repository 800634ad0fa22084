"""Progress reports of a step, and what a step may ask while it runs."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

Phase: TypeAlias = Literal[
    "waiting",
    "starting",
    "warming up",
    "loading",
    "reading",
    "sorting",
    "shuffling",
    "training",
    "importing",
    "tokenising",
    "comparing",
    "storing",
    "scoring",
    "fitting",
    "mixing",
    "searching",
    "averaging",
    "merging",
    "hanging",
    "saving",
]
"""Activity of a step. A training of a model or of a tokenizer is `training`."""
Unit: TypeAlias = Literal[
    "", "bytes", "documents", "characters", "updates", "blocks", "methods", "tensors", "averages", "parts"
]
REPORT_SECONDS = 1.0
"""Between two reports of a step that counts."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Progress:
    """Progress report of a step."""

    label: str
    """Domain, text or role: no identity."""
    phase: Phase
    done: int = 0
    total: int = 0
    """0: not known."""
    unit: Unit = ""
    per_second: float | None = None
    """Units of `done`, over the step's time so far."""
    first: int = 0
    """Where `done` began: an expert's first update is the seed's last."""
    note: str = ""
    """The reason for waiting or for being killed, in words."""
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    stall_seconds: float | None = None
    """How long training stood still for its last checkpoint."""
    upload_seconds: float | None = None
    """How long that checkpoint then took to be stored, while training went on."""
    mfu: float | None = None
    """Share of the GPUs' arithmetic that the model uses, where their peak is known."""
    learning_rate: float | None = None
    gradient_norm: float | None = None
    """Over the whole model, before clipping."""
    tokens: int | None = None
    """Trained on so far, from the training's own first update on."""
    development_loss: float | None = None
    """The newest loss on development blocks, in nats per token."""
    development_update: int | None = None
    """The update at which it was taken."""

    @property
    def share(self) -> float | None:
        """Share that is done, from 0 to 1; None where the total is not known."""
        span = self.total - self.first
        return min(1.0, max(0.0, (self.done - self.first) / span)) if span > 0 else None


class Control(Protocol):
    """A running step's line to its driver: reports, and whether to stop or save."""

    def report(self, progress: Progress) -> None:
        """Says how far it is."""

    def stopping(self) -> bool:
        """Whether to save and stop at the next update."""

    def saving(self) -> bool:
        """Whether to save at the next update and go on: this machine was told that it will be taken away."""


Watcher: TypeAlias = Callable[[Progress], None]


class Counter:
    """Counts what a phase of a step has done, and reports it: at its beginning, then once a second."""

    def __init__(
        self,
        control: Control,
        label: str,
        phase: Phase,
        total: int = 0,
        unit: Unit = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control, self._clock = control, clock
        self._began = self._reported = clock()
        self._label, self._phase, self._total, self._unit = label, phase, total, unit
        self.done = 0
        self._report(None)

    def add(self, amount: int = 1) -> None:
        """Counts so many units more."""
        self.done += amount
        now = self._clock()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self._report(self.done / (now - self._began))

    def over(self, items: Iterable[Item], size: Callable[[Item], int] = lambda _: 1) -> Iterator[Item]:
        """The items, each counted once it was dealt with."""
        for item in items:
            yield item
            self.add(size(item))

    def _report(self, rate: float | None) -> None:
        self._control.report(Progress(self._label, self._phase, self.done, self._total, self._unit, rate))
