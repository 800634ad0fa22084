"""The workers of a command that makes nothing: what the store lacks is an error."""

from collections.abc import Generator, Sequence

from btm_cluster.driver.port import Outcome
from btm_cluster.errors import UserError
from btm_cluster.requests import StepRequest, TrainRequest

SHOWN = 3


class NotMadeError(UserError):
    """Something that is asked for is not in the store."""


class Stored:
    """The port, refusing every step."""

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Nothing: there is no other process."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        """Refuses.

        Raises:
            NotMadeError: naming the first few of what is not there.
        """
        named = [f"{request.kind} {request.label}" for request in requests[:SHOWN]]
        more = f" and {len(requests) - SHOWN} more" if len(requests) > SHOWN else ""
        raise NotMadeError(
            "the store has not all that this plan makes",
            found=f"it lacks {', '.join(named)}{more}",
            remedy="`btm run PLAN` makes it",
        )
        yield
