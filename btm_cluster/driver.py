"""What the driver works with: the ledger, the workers, and a tally of what was made and what was there already.

Running a plan again is the resume path: whatever the ledger has is not asked for again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from btm_cluster.errors import StepError
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import Request
from btm_cluster.workers import Failure, Outcome, Workers

AnyRequest = TypeVar("AnyRequest", bound=Request)


class Driver:
    """Asks the workers for what the ledger lacks."""

    def __init__(self, ledger: Ledger, workers: Workers) -> None:
        self.ledger = ledger
        self.workers = workers
        self.made: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.is_asking = False
        """Whether workers are at something: they notice themselves when the run is stopped, and save."""

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
            self.is_asking = True
            try:
                made = verb(list(missing.values()))
            finally:
                self.is_asking = False
            outcomes |= dict(zip(missing, made, strict=True))
            self.made.update(request.kind for request in missing.values())
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
