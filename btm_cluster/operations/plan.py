"""`btm plan`: what a run would do, what is done already, and what the rest would cost.

Starts nothing, spends nothing.

It is the run itself, on workers that make nothing (`workers/dry_run.py`). A text not read yet hides what
depends on it: every training while no forest is founded, its own expert afterwards.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from btm_cluster.algorithm import Grown
from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.outstanding import baseline_requests
from btm_cluster.driver.port import Outcome
from btm_cluster.driver.prepared_plan import first_token_of, text_of
from btm_cluster.driver.recipes import expert_request, seed_request, seed_start
from btm_cluster.equations.budget import device_hours, stored_bytes
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.run import grow_and_evaluate
from btm_cluster.plan import Plan
from btm_cluster.requests import (
    AverageRequest,
    ImportTokenizer,
    ReadText,
    Resources,
    ScoreRequest,
    StepRequest,
    Tokenize,
    TrainRequest,
    TrainTokenizer,
)
from btm_cluster.workers.dry_run import DryRun, Overlay

DONE, NEW, UNREAD = "done", "new", "unknown until its text is read"


@dataclass(frozen=True)
class Step:
    """One line of the preview."""

    name: str
    state: str
    updates: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    device_hours: float | None = None
    """GPU-hours, or hours of the CPU group; None where no rate is known."""


@dataclass(frozen=True)
class Preview:
    """All steps of a plan, and what the new ones cost together."""

    steps: tuple[Step, ...]
    parameters: int
    non_embedding_parameters: int
    on_gpus: bool
    price_per_gpu_hour: float | None
    first_token: str
    """The token after which every block is read."""
    notes: tuple[str, ...] = ()
    """Notes beside the steps."""
    demands: tuple[Demand, ...] = ()
    """The groups that the trainings to come ask for, with the resources of
    their checkpoints where they have any."""
    requests: tuple[StepRequest, ...] = ()
    """Every step that is still to be made, as far as it is known before texts are read."""

    @property
    def device_hours(self) -> float | None:
        """Device hours of the trainings that are new; None while a rate is missing."""
        hours = [step.device_hours for step in self.steps if step.updates and step.state != DONE]
        return None if any(h is None for h in hours) else sum(h for h in hours if h is not None)

    @property
    def money(self) -> float | None:
        """At the plan's price."""
        hours = self.device_hours
        known = self.on_gpus and hours is not None and self.price_per_gpu_hour is not None
        return hours * self.price_per_gpu_hour if known else None  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        fields = asdict(replace(self, requests=()))
        del fields["requests"]
        fields["asks"] = fields.pop("demands")
        return fields | {"device_hours": self.device_hours, "money": self.money}


def preview(plan: Plan, ledger: Ledger, new_resources: bool = False) -> Preview:
    """The steps of a run of `plan` with this store.

    Raises:
        UserError: whatever a run would refuse before it spends anything.
    """
    walk = _Walk(Ledger(Overlay(ledger.storage)), new_resources)
    grown = grow_and_evaluate(plan, walk)
    parameters, non_embedding = count_parameters(grown.prepared.model)
    rate = _rate(plan, ledger)
    steps = [
        *_readings(walk, ledger),
        *_preparation(walk),
        *_trainings(grown, walk, parameters, rate),
        _scores(walk),
    ]
    return Preview(
        tuple(steps),
        parameters,
        non_embedding,
        plan.cluster.gpus_per_expert > 0,
        plan.cluster.price_per_gpu_hour,
        first_token_of(plan),
        tuple(_notes(plan)),
        _demands(walk),
        tuple(walk.dry_run.asked.values()),
    )


def check_capacity(plan: Plan, driver: Driver) -> None:
    """Refuses a run whose trainings can never have what they ask for, before a text is read.

    Raises:
        ResourcesError: naming what there is and what is asked.
    """
    driver.listener.say("looking at what is there")
    seen = preview(plan, driver.ledger, driver.new_resources)
    driver.listener.expect(seen.requests)
    driver.check_capacity(seen.demands)


class _Walk(Driver):
    """A driver that walks a dry run, and remembers every request and whether the store had its artifact."""

    def __init__(self, ledger: Ledger, new_resources: bool) -> None:
        self.dry_run = DryRun(ledger)
        super().__init__(ledger, self.dry_run, new_resources=new_resources)
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


def _notes(plan: Plan) -> Iterator[str]:
    training = plan.training
    if plan.cluster.price_per_gpu_hour is not None and not plan.cluster.gpus_per_expert:
        yield "`cluster.price_per_gpu_hour` prices nothing: experts train on CPU (`cluster.gpus_per_expert` is 0)"
    if plan.model.pretrained is None:
        return
    if not training.seed_updates:
        yield f"the pretrained model is the seed: experts train all {training.updates:,} updates"
        return
    yield (
        f"the pretrained model is the seed, and `training.seed_share` is {training.seed_share:g}: updates 1 "
        "to "
        f"{training.seed_updates:,} of {training.updates:,} are never made, and experts begin at that point "
        "of the "
        "learning-rate line; without `seed_share` they train all"
    )


def _readings(walk: _Walk, ledger: Ledger) -> Iterator[Step]:
    for request in walk.all_of(ReadText):
        if (read := walk.found.get(request.ref)) is None:
            yield Step(f"read {request.label}", NEW)
        else:
            text = ledger.get(Ref("text", text_of(read)))
            yield Step(f"read {request.label}", DONE, stored_bytes=_size([text]))


def _preparation(walk: _Walk) -> Iterator[Step]:
    (tokenizer,) = walk.all_of(TrainTokenizer, ImportTokenizer)
    yield Step("tokenizer", walk.state(tokenizer))
    blocks = walk.all_of(Tokenize)
    found = [walk.found[request.ref] for request in blocks if request.ref in walk.found]
    yield Step("token blocks", _share_done(walk, blocks), stored_bytes=_size(found))


def _scores(walk: _Walk) -> Step:
    """The scores of every model that is no average, on all held-out text."""
    averages = {request.ref for request in walk.all_of(AverageRequest)}
    scores = [request for request in walk.all_of(ScoreRequest) if request.inputs["model"][0] not in averages]
    return Step("scores", _share_done(walk, scores))


def _size(artifacts: Iterable[Artifact]) -> int:
    return sum(blob.size_bytes for artifact in artifacts for blob in artifact.blobs)


def _share_done(walk: _Walk, requests: Sequence[StepRequest]) -> str:
    states = [walk.state(request) for request in requests]
    done, hidden = states.count(DONE), states.count(UNREAD)
    if hidden == len(states):
        return UNREAD
    if hidden:
        return f"{done} of {len(states) - hidden} done, and more once all texts are read"
    return DONE if done == len(states) else NEW if not done else f"{len(states) - done} of {len(states)} new"


def _trainings(grown: Grown, walk: _Walk, parameters: int, rate: float | None) -> Iterator[Step]:
    """Seed, an expert for each of the plan's domains, and the baselines."""
    prepared = grown.prepared
    seed = seed_request(prepared)
    asked = {
        request.label: request for request in walk.all_of(TrainRequest) if isinstance(request, TrainRequest)
    }
    start = seed_start(prepared, seed.ref)
    yield _training(seed, walk.state(seed) if seed.label in asked else DONE, parameters, rate)
    for domain in prepared.domains:
        request = asked.get(domain.name)
        state = DONE if request is None else walk.state(request)
        yield _training(request or expert_request(prepared, domain, start), state, parameters, rate)
    for baseline in baseline_requests(prepared):
        yield _training(
            baseline, walk.state(baseline) if baseline.ref in walk.requests else NEW, parameters, rate
        )


def _training(request: TrainRequest, state: str, parameters: int, rate: float | None) -> Step:
    # Up to those it is another step's.
    updates = request.last_update - max([request.first_update, *request.milestones])
    return _training_step(
        f"{request.role} {request.label}" if request.role == "expert" else request.label,
        state,
        updates,
        updates * request.blocks_per_update * request.training.block_tokens,
        stored_bytes(parameters, request.role == "seed" and request.pretrained is None)
        * (max(1, len(request.parts)) + len(request.snapshots)),
        rate,
    )


def _training_step(name: str, state: str, updates: int, tokens: int, size: int, rate: float | None) -> Step:
    return Step(name, state, updates, tokens, size, None if rate is None else device_hours(tokens, rate))


def _rate(plan: Plan, ledger: Ledger) -> float | None:
    """Tokens per second of one GPU (or the CPU group): the plan's, or that of
    the newest training in the store."""
    if plan.cluster.tokens_per_gpu_second is not None:
        return plan.cluster.tokens_per_gpu_second
    on_gpus = plan.cluster.gpus_per_expert > 0
    notes = [model.note for model in ledger.list_artifacts("model")]
    alike = [note for note in notes if note.get("tokens_per_second") and (note["gpus"] > 0) == on_gpus]
    if not alike:
        return None
    newest = max(alike, key=lambda note: note["created"])
    return float(newest["tokens_per_second"]) / (newest["gpus"] or 1)


def _demands(walk: _Walk) -> tuple[Demand, ...]:
    """The groups that the trainings to come ask for: one for each size, and
    one for each training that goes on."""
    seen: dict[tuple[Resources, str], Demand] = {}
    for request in walk.dry_run.asked.values():
        if isinstance(request, TrainRequest):
            is_new_expert = request.role == "expert" and request.saved_at is None
            label = f"expert {request.label}" if request.role == "expert" else request.label
            demand = Demand("an expert" if is_new_expert else label, request.how, request.saved_at)
            seen.setdefault((demand.how, demand.label if demand.saved_at is not None else ""), demand)
    return tuple(seen.values())
