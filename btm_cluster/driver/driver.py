"""The driver: it asks workers for what the ledger lacks, and counts what was made and what was there already.

Running a plan again is the resume path: whatever the ledger has is not asked for again.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from typing import TypeAlias

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.outlook import Outlook
from btm_cluster.driver.port import Failure, Listener, OpenSearch, Outcome, Search, Workers
from btm_cluster.driver.run_log import RunLog
from btm_cluster.driver.saved import stopped_run
from btm_cluster.errors import BudgetError, StepError, Stopped, UserError
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import SearchPlan
from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.stopping import Interruption

CheckCapacity: TypeAlias = Callable[[Sequence[Demand]], None]
"""Refuses demands that the machines behind the workers can never meet."""


class Driver:
    """Asks the workers for what the ledger lacks."""

    def __init__(
        self,
        ledger: Ledger,
        workers: Workers,
        check_capacity: CheckCapacity | None = None,
        new_resources: bool = False,
        listener: Listener | None = None,
        run_log: RunLog | None = None,
        open_search: OpenSearch | None = None,
    ) -> None:
        self.ledger = ledger
        self.listener = listener or Outlook()
        self.workers = workers
        self._check_capacity, self._open_search = check_capacity, open_search
        self.run_log = run_log
        """Where the timeline of the command that this drives is stored, if it is."""
        self.new_resources = new_resources
        """Whether trainings go on from their checkpoints with the plan's resources,
        and not with those of their start."""
        self.made: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self._counted: set[Ref] = set()
        self.is_asking = False
        """Whether workers are at something: they notice themselves when the run is stopped, and save."""

    def check_capacity(self, demands: Sequence[Demand]) -> None:
        """Refuses demands that can never be met, before anything is spent.

        Raises:
            ResourcesError: naming what there is and what is asked.
        """
        if self._check_capacity is not None:
            with self._asking():
                self._check_capacity(demands)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self.is_asking = True
        try:
            yield
        finally:
            self.is_asking = False

    def run(self, requests: Iterable[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        """Each distinct request with its outcome: first what the ledger has, then
        what the workers make, as it is there.

        A training that was started before goes on with the resources of its first start.
        """
        asked: dict[Ref, StepRequest] = {}
        for request in requests:
            asked.setdefault(request.ref, request)
        missing: list[StepRequest] = []
        for request, found in zip(asked.values(), find_made(list(asked.values()), self.ledger), strict=True):
            if found is None:
                missing.append(request)
            else:
                self._count(self.reused, request)
                self.listener.found(request, found)
                yield request, found
        if not missing:
            return
        asked_for = [self._resumed(request) for request in missing]
        self.listener.ask(asked_for)
        left = {request.ref: request for request in asked_for}
        try:
            with self._asking(), closing(self.workers.run(asked_for)) as steps:
                for request, outcome in steps:
                    if isinstance(outcome, Artifact):
                        self._count(self.made, request)
                    left.pop(request.ref, None)
                    self.listener.end(request, outcome)
                    yield request, outcome
        except BudgetError:
            raise
        except (Stopped, Interruption) as exc:
            raise stopped_run(self.made.total(), left.values(), self.ledger) from exc

    def _count(self, tally: Counter[str], request: StepRequest) -> None:
        """Counts an artifact once, whatever asks for it again."""
        if request.ref not in self._counted:
            self._counted.add(request.ref)
            tally[request.kind] += 1

    def _resumed(self, request: StepRequest) -> StepRequest:
        return (
            resumed(request, self.ledger, self.new_resources)
            if isinstance(request, TrainRequest)
            else request
        )

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Tells the workers what will be asked for after the next call, as far as it is still to be made."""
        made = find_made(trainings, self.ledger)
        lacking = [request for request, one in zip(trainings, made, strict=True) if one is None]
        self.workers.get_ready([resumed(request, self.ledger, self.new_resources) for request in lacking])

    def check_search(self) -> None:
        """Refuses a search for a recipe where nobody could run one, before anything is spent.

        Raises:
            UserError: naming what is to be done instead.
        """
        if self._open_search is None:
            raise UserError(
                "a search for a recipe needs Ray, whose Tune draws the trials and stops them",
                found="`--in-process`, or a Ray Client (`--address ray://…`)",
                expected="a driver on a cluster, or one that starts Ray on this machine",
                remedy="run it so, or write the recipes as a list in `study.trials`",
            )

    def search(self, space: SearchPlan) -> AbstractContextManager[Search]:
        """A search for a recipe, which `check_search` allows."""
        assert self._open_search is not None
        return self._open_search(space)

    def obtain(self, requests: Sequence[StepRequest]) -> list[Outcome]:
        """An outcome for each request, in order. A request made twice runs once."""
        outcomes = {request.ref: outcome for request, outcome in self.run(requests)}
        return [outcomes[request.ref] for request in requests]

    def require(self, requests: Sequence[StepRequest]) -> list[Artifact]:
        """Like `obtain`, where nothing can go on without every one of them.

        Raises:
            StepError: naming what failed, attempts and cause.
        """
        return require_all(self.obtain(requests))


def find_made(requests: Sequence[StepRequest], ledger: Ledger) -> list[Artifact | None]:
    """The artifact of each request, in order; None where it, or one of a
    training's snapshots, is still to be made."""
    found = ledger.find_all([request.ref for request in requests])
    trained = [
        request
        for request, one in zip(requests, found, strict=True)
        if one is not None and isinstance(request, TrainRequest) and request.snapshots
    ]
    lacking = {
        request.ref
        for request in trained
        if None in ledger.find_all([snapshot.ref for snapshot in request.at_snapshots])
    }
    return [None if one is not None and one.ref in lacking else one for one in found]


def resumed(request: TrainRequest, ledger: Ledger, new_resources: bool = False) -> TrainRequest:
    """The request with the resources of its first start, where it was started before: results depend on them.

    With `new_resources` it goes on with its own, which the model's profile then tells by spans of updates.
    """
    saved = None if new_resources else ledger.latest_training(request.ref.identity)
    if saved is None:
        return request
    return replace(request, how=Resources(**saved.facts["how"]), saved_at=int(saved.recipe["update"]))


def require_all(outcomes: Sequence[Outcome]) -> list[Artifact]:
    """The artifacts.

    Raises:
        StepError: naming what failed instead, attempts and cause.
    """
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
