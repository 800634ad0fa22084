"""Progress reports of a step, and what a step may ask while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True)
class Progress:
    """Progress report of a step: what the live line shows."""

    label: str
    phase: str
    update: int = 0
    first_update: int = 0
    last_update: int = 0
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


class Control(Protocol):
    """A running step's line to its driver: reports, and whether to stop or save."""

    def report(self, progress: Progress) -> None:
        """Says how far it is."""

    def stopping(self) -> bool:
        """Whether to save and stop at the next update."""

    def saving(self) -> bool:
        """Whether to save at the next update and go on: this machine was told that it will be taken away."""


Watcher: TypeAlias = Callable[[Progress], None]
