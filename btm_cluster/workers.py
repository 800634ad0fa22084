"""The port between the driver and whoever does the work: its verbs, and the records that come back.

`requests/` has what is asked. `on_ray/` and `in_process.py` implement the port.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from btm_cluster.ledger import Artifact
from btm_cluster.requests import AverageRequest, MixRequest, PrepareRequest, ScoreRequest, SoupRequest, TrainRequest


@dataclass(frozen=True)
class Failure:
    """A request that could not be met; its siblings go on."""

    label: str
    attempts: int
    where: str
    cause: str
    has_diverged: bool = False
    """Whether it was the recipe's doing: the same everywhere, at every attempt."""


Outcome: TypeAlias = Artifact | Failure


@dataclass(frozen=True)
class Progress:
    """A sign of life of one training: what the live line shows."""

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


class Control(Protocol):
    """What a step may say and ask while it runs."""

    def report(self, progress: Progress) -> None:
        """Says how far it is."""

    def stopping(self) -> bool:
        """Whether to save and stop at the next update."""

    def saving(self) -> bool:
        """Whether to save at the next update and go on: this machine was told that it will be taken away."""


Watcher: TypeAlias = Callable[[Progress], None]


class Workers(Protocol):
    """The verbs. Each takes any number of requests and returns an outcome for each, in order; none cancels another.

    A user's mistake (UserError) and a stop (Stopped) are raised, not returned.
    """

    def prepare(self, requests: Sequence[PrepareRequest]) -> list[Outcome]:
        """Text to token blocks."""

    def train(self, requests: Sequence[TrainRequest]) -> list[Outcome]:
        """Token blocks to models."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Models and token blocks to token log-probabilities."""

    def mix(self, requests: Sequence[MixRequest]) -> list[Outcome]:
        """Several models' log-probabilities of a text to those of their mixtures."""

    def average(self, requests: Sequence[AverageRequest]) -> list[Outcome]:
        """Models to one model."""

    def soup(self, requests: Sequence[SoupRequest]) -> list[Outcome]:
        """Models and token blocks to the weights of an average."""
