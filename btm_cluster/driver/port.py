"""The port between the driver and the workers: what is asked for, and the records that come back.

`requests/` has what is asked. `workers/` implements the port.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from btm_cluster.ledger import Artifact
from btm_cluster.plan import SearchPlan
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


class Listener(Protocol):
    """Hears what a driver asks for and what comes of it."""

    def expect(self, requests: Iterable[StepRequest]) -> None:
        """These will be asked for, as far as is known before texts are read."""

    def found(self, request: StepRequest, artifact: Artifact) -> None:
        """This was there already."""

    def ask(self, requests: Sequence[StepRequest]) -> None:
        """These are given to the workers."""

    def end(self, request: StepRequest, outcome: Outcome) -> None:
        """A step came to its end."""

    def say(self, what: str) -> None:
        """The activity, where that is no step."""

    def part(self, what: str) -> None:
        """A part of the whole begins. How long the others take is not known."""

    def table(self, lines: str) -> None:
        """The state of trials that compete, as a table; an empty one ends it."""


class Workers(Protocol):
    """Runs steps, wherever that is."""

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Announces trainings of a later call than the next one: their processes may start before."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        """Runs the requests, all distinct, and yields each with its outcome as it
        finishes; none cancels another.

        A request may need what another one of the same call makes, and starts once that is there. Where it
        failed, so does the request. Where several could start, the first ones do.

        Raises:
            UserError, Stopped: a user's mistake and a stop are raised, not returned.
        """


class Search(Protocol):
    """Trials of recipes, of which those that lose are stopped early."""

    def under_way(self) -> Mapping[int, Mapping[str, float]]:
        """The settings of each trial that goes on, by number from 1; nothing once all have ended.

        Waits until as many are under way as should be.
        """

    def tell(self, trial: int, share: float, perplexity: float | None) -> None:
        """How a trial does after a share of its training; without a perplexity it has diverged, and ends."""


OpenSearch: TypeAlias = Callable[[SearchPlan], AbstractContextManager[Search]]
