"""The port between the driver and the workers: what is asked for, and the records that come back.

`requests/` has what is asked. `on_ray/` and `in_process.py` implement the port.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from btm_cluster.ledger import Artifact
from btm_cluster.requests import StepRequest, TrainRequest


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
    """Runs steps, wherever that is."""

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Announces trainings of a later call than the next one: their processes may start before."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        """Runs the requests, all distinct, and yields each with its outcome as it finishes; none cancels another.

        A request may need what another one of the same call makes, and starts once that is there. Where it failed, so does
        the request. Where several could start, the first ones do.

        Raises:
            UserError, Stopped: a user's mistake and a stop are raised, not returned.
        """
