"""`btm plan`: what a run would do, what is done already, and what the rest would cost.

Starts nothing, spends nothing.

It is the run itself, on workers that make nothing (`workers/dry_run.py`). A text not read yet hides what
depends on it: every training while no forest is founded, its own expert afterwards.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from btm_cluster.algorithm import Grown
from btm_cluster.data.first_look import Unread, look_into
from btm_cluster.driver.budget import Spent, budget_notes
from btm_cluster.driver.capacity import Demand, memory_problem
from btm_cluster.driver.demands import demands_of
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.gpu_memory import told
from btm_cluster.driver.outstanding import baseline_requests
from btm_cluster.driver.plan_notes import notes_on
from btm_cluster.driver.prepared_plan import PreparedPlan, text_of
from btm_cluster.driver.rates import FORWARD_SHARE, Rate, rates_of
from btm_cluster.driver.recipes import expert_request, expert_resources, seed_request, seed_start
from btm_cluster.driver.room import SOME_CLUSTER, Room
from btm_cluster.driver.text_requests import first_token_of
from btm_cluster.driver.text_sizes import TextSize, TextUse, text_sizes, text_uses
from btm_cluster.equations.budget import wall_hours
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.plan_costs import (
    Costs,
    Mixture,
    Step,
    checkpoint_bytes,
    mixture_step,
    mixtures_of,
    training_step,
)
from btm_cluster.operations.run import grow_and_evaluate
from btm_cluster.plan import Plan
from btm_cluster.requests import (
    AverageRequest,
    ImportTokenizer,
    ReadText,
    ScoreRequest,
    StepRequest,
    Tokenize,
    TrainRequest,
    TrainTokenizer,
)
from btm_cluster.workers.disk_and_memory import check_disk_of_store
from btm_cluster.workers.dry_walk import DONE, NEW, UNREAD, DryWalk

TOKEN_BLOCKS = "token blocks"


@dataclass(frozen=True)
class Preview:
    """All steps of a plan, and what the new ones cost together."""

    steps: tuple[Step, ...]
    texts: tuple[TextUse, ...]
    """Passes over each domain's training text."""
    parameters: int
    non_embedding_parameters: int
    on_gpus: bool
    """Whether experts are trained on GPUs."""
    rate: Rate
    """Rate at which one device trains an expert."""
    wall_hours: float
    """Hours until all is trained and scored, with as much at once as there is room for."""
    room: str
    """The machines that this is for, in words."""
    price_per_gpu_hour: float | None
    first_token: str
    """The token after which every block is read."""
    notes: tuple[str, ...] = ()
    """Notes beside the steps."""
    demands: tuple[Demand, ...] = ()
    """The groups that the trainings to come ask for, with the resources of
    their checkpoints where they have any."""
    gpu_bytes: float | None = None
    """Memory of the GPUs, where there are some to look at."""
    requests: tuple[StepRequest, ...] = ()
    """Every step that is still to be made, as far as it is known before texts are read."""

    @property
    def is_done(self) -> bool:
        """Whether a run has nothing to make."""
        return all(step.state == DONE for step in self.steps)

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the steps to come."""
        return _cost(self.steps).gpu_hours

    @property
    def cpu_hours(self) -> float:
        """CPU-hours of the trainings and scores to come that run without a GPU."""
        return _cost(self.steps).cpu_hours

    @property
    def money(self) -> float | None:
        """At the plan's price."""
        known = self.on_gpus and self.price_per_gpu_hour is not None
        return self.gpu_hours * self.price_per_gpu_hour if known else None  # type: ignore[operator]

    @property
    def bytes_to_store(self) -> int:
        """At least: the models that are new."""
        # Bytes of token blocks are of those that are there.
        new = (step for step in self.steps if step.state != DONE and step.name != TOKEN_BLOCKS)
        return sum(step.stored_bytes for step in new)

    @property
    def checkpoint_bytes(self) -> int:
        """Most that the training checkpoints of trainings under way take: two of each, while one is replaced."""
        return checkpoint_bytes(self.requests)

    @property
    def memory_lines(self) -> list[str]:
        """A line for each group on GPUs: how much memory each of these takes."""
        return [
            f"memory of {demand.label}: {told(demand.memory, self.gpu_bytes)}"
            for demand in self.demands
            if demand.memory is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        fields = asdict(replace(self, requests=(), demands=()))
        del fields["requests"], fields["demands"]
        fields["asks"] = [
            asdict(replace(demand, memory=None))
            | {"memory": demand.memory and asdict(demand.memory.memory(self.gpu_bytes))}
            for demand in self.demands
        ]
        fields["texts"] = [asdict(use) | {"passes": use.passes} for use in self.texts]
        return (
            fields
            | {"gpu_hours": self.gpu_hours, "cpu_hours": self.cpu_hours, "money": self.money}
            | {"checkpoint_bytes": self.checkpoint_bytes}
        )


def preview(plan: Plan, ledger: Ledger, new_resources: bool = False, room: Room = SOME_CLUSTER) -> Preview:
    """The steps of a run of `plan` with this store, on machines that have `room`.

    Raises:
        UserError: whatever a run would refuse before it spends anything.
    """
    walk = DryWalk(ledger, new_resources)
    grown = grow_and_evaluate(plan, walk)
    look_into(_unread_texts(walk), plan.training.block_tokens)
    prepared = grown.prepared
    reads = {request.label: request for request in walk.all_of(ReadText) if isinstance(request, ReadText)}
    sizes = text_sizes(prepared, reads, ledger)
    uses = text_uses(prepared, sizes)
    parameters, non_embedding = count_parameters(prepared.model)
    cost = Costs(plan, walk, room, rates_of(plan, prepared.model, ledger, room.gpu))
    trainings = list(_trainings(grown, cost))
    tokens_of = _held_out_tokens(prepared, sizes)
    mixtures = mixtures_of(walk, prepared, tokens_of)
    merging = [*(mixture_step(one, cost) for one in mixtures), _scores(prepared, tokens_of, mixtures, cost)]
    steps = (*_readings(walk, ledger), *_preparation(walk), *trainings, *merging)
    demands = demands_of(walk.dry_run.asked.values(), plan)
    for demand in demands:
        if problem := memory_problem(demand, room.gpu_bytes):
            raise problem
    return Preview(
        steps,
        uses,
        parameters,
        non_embedding,
        plan.cluster.gpus_per_expert > 0,
        cost.rates.experts[plan.cluster.gpus_per_expert > 0],
        _wall_hours(trainings, merging),
        room.name,
        plan.cluster.price_per_gpu_hour,
        first_token_of(plan),
        (
            *notes_on(plan, uses),
            *budget_notes(plan, ledger, _cost(steps)),
        ),
        demands,
        room.gpu_bytes,
        tuple(walk.dry_run.asked.values()),
    )


def _cost(steps: Sequence[Step]) -> Spent:
    on_gpus = sum(step.device_hours for step in steps if step.on_gpus)
    return Spent(on_gpus, sum(step.device_hours for step in steps if not step.on_gpus))


def check_run(plan: Plan, driver: Driver) -> tuple[str, ...]:
    """Refuses a run whose trainings can never have what they ask for, before a text is read; returns what
    should be known of it.

    Raises:
        ResourcesError: naming what there is and what is asked, of devices, memory or disk.
        BudgetError: the plan's budget is spent.
    """
    driver.listener.say("looking at what is there")
    seen = preview(plan, driver.ledger, driver.new_resources)
    driver.listener.expect(seen.requests)
    check_disk_of_store(driver.ledger.storage.location, seen.bytes_to_store)
    driver.check_capacity(seen.demands)
    return seen.notes


def _readings(walk: DryWalk, ledger: Ledger) -> Iterator[Step]:
    for request in walk.all_of(ReadText):
        if (read := walk.found.get(request.ref)) is None:
            yield Step(f"read {request.label}", NEW)
        else:
            text = ledger.get(Ref("text", text_of(read)))
            yield Step(f"read {request.label}", DONE, stored_bytes=_size([text]))


def _unread_texts(walk: DryWalk) -> list[Unread]:
    reads = (request for request in walk.all_of(ReadText) if isinstance(request, ReadText))
    unread = (request for request in reads if request.ref not in walk.found)
    return [Unread(one.source, one.reading, one.is_target, one.template) for one in unread]


def _preparation(walk: DryWalk) -> Iterator[Step]:
    (tokenizer,) = walk.all_of(TrainTokenizer, ImportTokenizer)
    yield Step("tokenizer", walk.state(tokenizer))
    blocks = walk.all_of(Tokenize)
    found = [walk.found[request.ref] for request in blocks if request.ref in walk.found]
    yield Step(TOKEN_BLOCKS, _share_done(walk, blocks), stored_bytes=_size(found))


def _held_out_tokens(prepared: PreparedPlan, sizes: Sequence[TextSize]) -> dict[tuple[Ref, ...], float]:
    """Tokens of each development and test text, by its blocks: of the two, each is about half."""
    held_out = {size.name: size.held_out or 0 for size in sizes}
    return {refs: held_out.get(text.name, 0) / 2 for text in prepared.texts for refs in text.tokens.values()}


def _scores(
    prepared: PreparedPlan,
    tokens_of: Mapping[tuple[Ref, ...], float],
    mixtures: Iterable[Mixture],
    cost: Costs,
) -> Step:
    """The scores of every model on all held-out text; averages are not counted as done or new, since they are
    named by fits."""
    walk = cost.walk
    asked = [request for request in walk.all_of(ScoreRequest) if isinstance(request, ScoreRequest)]
    averages = {request.ref for request in walk.all_of(AverageRequest)}
    passes = {mixture.request.ref: mixture.size.inference_cost for mixture in mixtures}
    new = (one for one in asked if walk.state(one) != DONE)
    tokens = sum(passes.get(one.model, 1) * tokens_of.get(one.tokens, 0) for one in new)
    state = _share_done(walk, [one for one in asked if one.model not in averages])
    fields = cost.of(expert_resources(prepared.plan), FORWARD_SHARE * tokens)
    # Of many models, so that all machines have some of it to do.
    return Step("scores", state, **fields | {"hours": fields["hours"] * fields["share"], "share": 1.0})


def _size(artifacts: Iterable[Artifact]) -> int:
    return sum(blob.size_bytes for artifact in artifacts for blob in artifact.blobs)


def _share_done(walk: DryWalk, requests: Sequence[StepRequest]) -> str:
    states = [walk.state(request) for request in requests]
    done, hidden = states.count(DONE), states.count(UNREAD)
    if hidden == len(states):
        return UNREAD
    if hidden:
        return f"{done} of {len(states) - hidden} done, and more once all texts are read"
    return DONE if done == len(states) else NEW if not done else f"{len(states) - done} of {len(states)} new"


def _trainings(grown: Grown, cost: Costs) -> Iterator[Step]:
    """Seed, an expert for each of the plan's domains, and the baselines."""
    prepared, walk = grown.prepared, cost.walk
    seed = seed_request(prepared)
    asked = {
        request.label: request for request in walk.all_of(TrainRequest) if isinstance(request, TrainRequest)
    }
    start = seed_start(prepared, seed.ref)
    yield training_step(seed, walk.state(seed) if seed.label in asked else DONE, cost)
    for domain in prepared.domains:
        request = asked.get(domain.name)
        state = DONE if request is None else walk.state(request)
        yield training_step(request or expert_request(prepared, domain, start), state, cost)
    for baseline in baseline_requests(prepared):
        yield training_step(baseline, walk.state(baseline) if baseline.ref in walk.requests else NEW, cost)


def _wall_hours(trainings: Sequence[Step], merging: Sequence[Step]) -> float:
    """The seed alone, then the others beside each other, then the steps after them one by one."""
    seed, *others = trainings
    beside = wall_hours([(step.hours, step.share) for step in others])
    return seed.hours + beside + sum(step.hours for step in merging)
