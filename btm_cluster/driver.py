"""What the driver works with: the ledger, the workers, and a tally of what was made and what was there already.

Running a plan again is the resume path: whatever the ledger has is not asked for again.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

from btm_cluster.errors import StepError
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import Request
from btm_cluster.room import Ask
from btm_cluster.workers import Failure, Outcome, Workers

AnyRequest = TypeVar("AnyRequest", bound=Request)

CheckRoom: TypeAlias = Callable[[Sequence[Ask]], None]
"""Refuses asks that the machines behind the workers can never meet."""


class Driver:
    """Asks the workers for what the ledger lacks."""

    def __init__(
        self, ledger: Ledger, workers: Workers, check_room: CheckRoom | None = None, new_resources: bool = False
    ) -> None:
        self.ledger = ledger
        self.workers = workers
        self._check_room = check_room
        self.new_resources = new_resources
        """Whether trainings go on from their checkpoints with the plan's resources, and not with those of their start."""
        self.made: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.is_asking = False
        """Whether workers are at something: they notice themselves when the run is stopped, and save."""

    def check_room(self, asks: Sequence[Ask]) -> None:
        """Refuses asks that can never be met, before anything is spent.

        Raises:
            ResourcesError: naming what there is and what is asked.
        """
        if self._check_room is not None:
            with self._asking():
                self._check_room(asks)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self.is_asking = True
        try:
            yield
        finally:
            self.is_asking = False

    def obtain(
        self, verb: Callable[[Sequence[AnyRequest]], list[Outcome]], requests: Sequence[AnyRequest]
    ) -> list[Outcome]:
        """An outcome for each request, in order: from the ledger, or from the workers. A request made twice runs once."""
        asked: dict[Ref, AnyRequest] = {}
        for request in requests:
            asked.setdefault(request.ref, request)
        outcomes: dict[str, Outcome] = {}
        missing: dict[str, AnyRequest] = {}
        for (ref, request), found in zip(asked.items(), self.ledger.find_all(list(asked)), strict=True):
            if found is None:
                missing[ref.identity] = request
            else:
                outcomes[ref.identity] = found
                self.reused[request.kind] += 1
        if missing:
            with self._asking():
                made = verb(list(missing.values()))
            outcomes |= dict(zip(missing, made, strict=True))
            self.made.update(
                request.kind for request in missing.values() if isinstance(outcomes[request.ref.identity], Artifact)
            )
        return [outcomes[request.ref.identity] for request in requests]

    def require(
        self, verb: Callable[[Sequence[AnyRequest]], list[Outcome]], requests: Sequence[AnyRequest]
    ) -> list[Artifact]:
        """Like `obtain`, where nothing can go on without every one of them.

        Raises:
            StepError: naming what failed, attempts and cause.
        """
        outcomes = self.obtain(verb, requests)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if failures:
            raise step_error(failures)
        return [outcome for outcome in outcomes if isinstance(outcome, Artifact)]


def step_error(failures: Sequence[Failure]) -> StepError:
    """One error for several failed requests."""
    lines = [f"{f.label}: {f.attempts} attempt(s), {f.where}: {f.cause}" for f in failures]
    return StepError(
        f"{len(failures)} step(s) failed\n" + "\n".join(f"- {line}" for line in lines),
        remedy="change what each of them names; the same would come of the same recipe"
        if all(f.has_diverged for f in failures)
        else "the same command tries only these again",
    )


def steps_line(made: Mapping[str, int], reused: Mapping[str, int]) -> str:
    """How many steps ran, and how many were there already."""
    kinds = sorted({*made, *reused})
    counts = ", ".join(f"{kind} {made.get(kind, 0)} ({reused.get(kind, 0)})" for kind in kinds)
    return f"steps run (and reused): {counts or 'none'}"
