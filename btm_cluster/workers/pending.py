"""The requests of one call that have not started: which may start, and which never
will since an input failed. Runs nothing."""

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Sequence

from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.ledger import Ref
from btm_cluster.requests import MergeRequest, ScoreRequest, StepRequest, TrainRequest


class Pending:
    """Requests until each is started or has failed.

    Of those that could start, the first ones that were asked for do.
    """

    def __init__(self, requests: Sequence[StepRequest]) -> None:
        self._requests = {request.ref: request for request in requests}
        self._place = {request.ref: number for number, request in enumerate(requests)}
        # Whoever is asked for an artifact by name makes it, and not whoever passes it on the way to another.
        self._makers = {made: request.ref for request in requests for made in request.makes}
        self._makers |= {ref: ref for ref in self._requests}
        self._finished: set[Ref] = set()
        self._alone: set[Ref] = set()
        """Requests that failed together with others, and start without them."""
        self._followers: defaultdict[Ref, list[Ref]] = defaultdict(list)
        for ref, request in self._requests.items():
            for maker in self.awaited(request):
                self._followers[maker].append(ref)
        self._ready = [ref for ref, request in self._requests.items() if not self.awaited(request)]
        """In the order in which they were asked for."""

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def trainings(self) -> list[TrainRequest]:
        """The trainings that have not started, the forest's before its baselines'."""
        trainings = [request for request in self._requests.values() if isinstance(request, TrainRequest)]
        return sorted(trainings, key=lambda request: request.priority)

    @property
    def merges(self) -> list[MergeRequest]:
        """The averages and other merges that have not started."""
        return [request for request in self._requests.values() if isinstance(request, MergeRequest)]

    @property
    def models_to_score(self) -> int:
        """How many models have scores that have not started."""
        return len(
            {request.model for request in self._requests.values() if isinstance(request, ScoreRequest)}
        )

    def awaited(self, request: StepRequest) -> set[Ref]:
        """The unfinished requests of this call that make what a request needs,
        whether it is of this call or not."""
        makers = {self._makers[need] for need in request.needs if need in self._makers}
        return makers - self._finished - {request.ref}

    def awaited_in_turn(self, request: StepRequest) -> set[Ref]:
        """The unfinished requests that must be done before a request can start: what it
        awaits, what that awaits, and so on."""
        found, fresh = set[Ref](), self.awaited(request)
        while fresh:
            found |= fresh
            fresh = {
                ref for one in fresh if one in self._requests for ref in self.awaited(self._requests[one])
            } - found
        return found

    def next_batch(self, may_start: Callable[[StepRequest], bool] = lambda _: True) -> list[StepRequest]:
        """The first request that may start and whose inputs are there, with the
        others that one process should do with it.

        They count as started from now on. Nothing where there is none.
        """
        ready = [self._requests[ref] for ref in self._ready]
        first = next((one for one in ready if may_start(one) and self._has_its_turn(one)), None)
        if first is None:
            return []
        batch = [one for one in ready if one is first or self._go_together(one, first)]
        for request in batch:
            self._ready.remove(request.ref)
            del self._requests[request.ref]
        return batch

    def _go_together(self, one: StepRequest, other: StepRequest) -> bool:
        return one.batch is not None and one.batch == other.batch and not {one.ref, other.ref} & self._alone

    def _has_its_turn(self, request: StepRequest) -> bool:
        """Whether no training of a lower number waits, but for those that wait for this one."""
        if not request.priority:
            return True
        own = request.priority
        before = [
            ref for ref, one in self._requests.items() if one.priority is not None and one.priority < own
        ]
        return not before or any(ref in self._followers[request.ref] for ref in before)

    def put_back(self, request: StepRequest) -> None:
        """Takes a request again that was started and came to nothing."""
        self._requests[request.ref] = request
        insort(self._ready, request.ref, key=self._place.__getitem__)

    def take_apart(self, batch: Sequence[StepRequest]) -> bool:
        """Takes the requests of a batch that failed again, each to start alone, and says whether it did.

        Of averages one may fail of a model that has no weight in the others.
        """
        if len(batch) == 1 or not isinstance(batch[0], MergeRequest):
            return False
        for request in batch:
            self._alone.add(request.ref)
            self.put_back(request)
        return True

    def finish(self, request: StepRequest, outcome: Outcome) -> list[tuple[StepRequest, Failure]]:
        """Notes an outcome. The requests that can never start because of it, each with its failure."""
        self._finished.add(request.ref)
        failed: list[tuple[StepRequest, Failure]] = []
        for follower in self._followers[request.ref]:
            other = self._requests.get(follower)
            if other is None:  # it has failed by way of another input
                continue
            if isinstance(outcome, Failure):
                del self._requests[follower]
                cause = f"its input failed: {request.label}"
                failure = Failure(other.label, 0, "not started", cause, outcome.has_diverged)
                failed += [(other, failure), *self.finish(other, failure)]
                continue
            if not self.awaited(other):
                insort(self._ready, follower, key=self._place.__getitem__)
        return failed
