"""A driver that walks a dry run: what a command would ask of the workers, and what is there already."""

from collections.abc import Generator, Iterable

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import StepRequest
from btm_cluster.workers.dry_run import DryRun, Overlay

DONE, NEW, UNREAD = "done", "new", "unknown until its text is read"


class DryWalk(Driver):
    """Remembers every request and whether the store had its artifact. Nothing is written to the store."""

    def __init__(self, ledger: Ledger, new_resources: bool = False) -> None:
        self.store = ledger
        """The store as it is, without the placeholders of what would be made."""
        overlay = Ledger(Overlay(ledger.storage))
        self.dry_run = DryRun(overlay)
        super().__init__(overlay, self.dry_run, new_resources=new_resources)
        self.found: dict[Ref, Artifact] = {}
        self.requests: dict[Ref, StepRequest] = {}

    def run(self, requests: Iterable[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        for request, outcome in super().run(requests):
            self.requests.setdefault(request.ref, request)
            if request.ref not in self.dry_run.asked and isinstance(outcome, Artifact):
                self.found[request.ref] = outcome
            yield request, outcome

    def state(self, request: StepRequest) -> str:
        """Whether a step is done, new, or unknown until its text is read."""
        if self.dry_run.hides(request):
            return UNREAD
        return DONE if request.ref in self.found else NEW

    def all_of(self, *kinds: type[StepRequest]) -> list[StepRequest]:
        """The requests of some kinds, in the order in which they were asked for."""
        return [request for request in self.requests.values() if isinstance(request, kinds)]
