"""The plan: one YAML file that the user writes, read into frozen values.

Knows the fields, their units, defaults and reasons; knows nothing of torch, Ray or a store, so that a wrong
plan is refused in a fraction of a second. `read_plan` is the only way in; `problems.py` words what it
refuses.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from btm_cluster.errors import PlanError
from btm_cluster.plan import rules as plan_rules
from btm_cluster.plan.broken_rules import Broken, Given, field_of
from btm_cluster.plan.budget import BudgetPlan, budget_rules
from btm_cluster.plan.expansion import ExpansionPlan
from btm_cluster.plan.file import read_plan_file
from btm_cluster.plan.folder import opened_folder
from btm_cluster.plan.problems import describe_problems
from btm_cluster.plan.section import Section
from btm_cluster.plan.study import StudyPlan
from btm_cluster.plan.texts import DomainPlan, ReadingPlan, TextPlan
from btm_cluster.plan.tracking import TrackingPlan
from btm_cluster.plan.training import BranchingPlan, ModelPlan, TokenizerPlan, TrainingPlan
from btm_cluster.plan.values import (
    PLAN_FOLDER,
    PLAN_TEXT,
    Blocks,
    Name,
    Place,
    Positive,
    PositiveReal,
    Real,
    Switch,
    Whole,
)


class MixtureOfExpertsPlan(Section):
    """One model of all experts: their feed-forwards, behind a router in every layer."""

    experts_per_token: Positive = 2
    """Feed-forwards that a token passes in every layer, of those with the largest scores. All experts, where
    a forest has fewer."""
    rest: Literal["average", "seed"] | None = None
    """Whose attention, embeddings and norms it has: those of the experts' uniform average, or the seed's. Unless
    this is written, it is the seed for `branching.train: feed-forward`, which is exact, and the average for
    experts that have changed the rest too."""


class MergingPlan(Section):
    """How experts are combined, and on how much development text that is fitted."""

    rules: ClassVar = plan_rules.merging_rules
    posterior: Literal["calibrated", "full", "last-token", "window", "gate"] = "calibrated"
    """The context that the posterior sees: `full` is the paper's equation, `last-token` its scorer,
    `calibrated` weighs the evidence. `gate` is a small network instead, learned on development text, on how
    well and how surely each expert has predicted so far: better where it was measured, and some seconds more
    for each text. It has no use for `prior` and `top_k`; averages are weighted as ever."""
    with_seed: bool = False
    """Mix the seed with the experts, as one model more: in `btm generate`, and in a row of its own beside the
    ensembles of experts alone. Worth most where experts overfit their text; worth nothing where the seed is
    weak. Costs one more model per token. Averages are unaffected."""
    prior: Literal["fitted", "ema", "mean", "uniform"] = "fitted"
    """`ema` is the paper's estimate; `fitted` maximises the likelihood of the development text."""
    average_prior: Literal["fitted", "ema", "mean", "uniform"] = "fitted"
    """By which averages are weighted.

    The paper's `ema` is near one-hot; `fitted` is softer, and better on unseen targets.
    """
    development_blocks: Positive = 100
    """Development blocks used for everything fitted, in hash order. The paper: 100."""
    top_k: Positive | None = None
    """Keep only the k experts with the largest prior."""
    window_tokens: Positive = 32
    """Context of the `window` posterior."""
    discount: Annotated[Real, Field(le=1)] = 0.97
    """How much a token of evidence still counts one token later, in the `calibrated` posterior."""
    clusters: Place | None = None
    """Folder of a cluster model of `btm discover` whose clusters are named as the domains: adds the ensemble
    that weighs experts by distance to them to the evaluation."""
    cluster_temperature: PositiveReal = 0.1
    """T of that ensemble's weights, softmax(-dist²/T). c-BTM: 0.1."""
    mixture_of_experts: MixtureOfExpertsPlan | None = None
    """Evaluate a mixture of experts too, as `btm export --moe` writes it; `{}` is one with the defaults. It
    needs a llama, mistral, qwen2, qwen3 or olmo2, and development text of every domain."""


class ClusterPlan(Section):
    """How the work is done. Nothing here is part of an identity."""

    rules: ClassVar = plan_rules.cluster_rules
    seed_gpus: Real = 0
    """GPUs of the seed's and the Transformer-LM's group; 0 trains on CPU. A fraction leaves a share of
    the GPU to experts, whose processes then start while the seed is trained."""
    gpus_per_expert: Real = 0
    """GPUs of an expert's group. A fraction lets several experts share a GPU."""
    seed_cpus: Positive = 2
    """CPUs, and so threads, of the seed's whole group."""
    cpus_per_expert: Positive = 1
    """CPUs, and so threads, of an expert's whole group."""
    autoscaling: bool = False
    """The cluster can grow: a demand that it cannot meet yet waits, saying so
    every minute, instead of being refused."""
    concurrent_experts: Positive | None = None
    """Experts trained at once; without it, as many as the cluster can hold."""
    retries: Whole = 3
    """Times a step is tried again after its process or node died."""
    micro_batch_blocks: Blocks = 16
    """Blocks per forward pass; an update accumulates as many as it needs. `auto` takes as many as fit into the GPU's
    memory, by an estimate, and 16 on CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on a GPU, float32 on CPU. Weights stay float32."""
    compile: Switch = "auto"
    """torch.compile; `auto` is on for a GPU, off on CPU."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """The part of a training that each GPU of a group holds. `none`: a whole model with its gradients and
    moments (data parallel). `full`: its share of them (FSDP2), gathered layer by layer. `auto` shards where the
    whole would not fit, by an estimate. A DEMix is split by domains, whatever this says."""
    activation_checkpointing: Switch = "auto"
    """Keep each layer's input alone, and compute its activations once more for the backward pass: a third
    more arithmetic. `auto` is on where they would not fit into the GPU's memory, and off on CPU."""
    profile: bool = False
    """Keep a torch.profiler trace of three updates of every training, as an artifact of kind `profile`, to be looked
    at in Perfetto. It takes some seconds of each, and changes no result."""
    checkpoint_minutes: PositiveReal = 15
    """Most training time that a lost machine can cost."""
    hang_minutes: PositiveReal = 30
    """Training that shows no update for so long is killed and tried again, as if its process had died."""
    stop_grace_seconds: PositiveReal = 120
    """Time a stopped run has to save its training checkpoints."""
    price_per_gpu_hour: Real | None = None
    """For `btm plan`, and for `budget.money`."""
    tokens_per_gpu_second: PositiveReal | None = None
    """For `btm plan`; without it, the rate of earlier runs in the store, or one that follows from the model's
    FLOPs and the GPU."""


def _rules(given: Given) -> Iterator[Broken]:
    yield from plan_rules.plan_rules(given)
    yield from budget_rules(given)


class Plan(Section):
    """One forest: its texts, model, recipe and how it is grown."""

    rules: ClassVar = _rules
    name: Name
    """Shown in the dashboard and in reports."""
    store: Place
    """Folder, or s3://bucket/prefix. A relative path, here and for texts, begins at the folder of the plan."""
    domains: Annotated[tuple[DomainPlan, ...], Field(min_length=1)]
    """Texts that get an expert each."""
    targets: tuple[TextPlan, ...] = ()
    """Texts that are evaluated and never trained on."""
    reading: ReadingPlan = ReadingPlan()
    """How texts become documents."""
    tokenizer: TokenizerPlan
    """Trained or pretrained; one for the whole forest."""
    model: ModelPlan
    """Architecture and size; one for the whole forest."""
    training: TrainingPlan = TrainingPlan()
    """The recipe shared by seed, experts and Transformer-LM."""
    branching: BranchingPlan = BranchingPlan()
    """How experts start and what they train."""
    merging: MergingPlan = MergingPlan()
    """How experts are combined."""
    baselines: tuple[Literal["transformer-lm", "demix"], ...] = ()
    """Baselines trained with the same compute on the same text."""
    cluster: ClusterPlan = ClusterPlan()
    """How the work is done."""
    budget: BudgetPlan = BudgetPlan()
    """Limits on its cost."""
    study: StudyPlan | None = None
    """For `btm study` alone; without it, the plan's own model with all baselines and controls."""
    expansion: ExpansionPlan = ExpansionPlan()
    """How `btm expand` takes what has arrived."""
    tracking: TrackingPlan = TrackingPlan()
    """Where curves go besides the store."""

    @model_validator(mode="before")
    @classmethod
    def _settle_seed_share(cls, given: Any) -> Any:
        """A pretrained model is a seed already, so that nothing is kept back for
        one unless the plan says so."""
        if not isinstance(given, Mapping) or field_of(given.get("model"), "pretrained") is None:
            return given
        training = given.get("training", {})
        if isinstance(training, Mapping):
            return {**given, "training": {"seed_share": 0.0, **training}}
        if isinstance(training, TrainingPlan) and "seed_share" not in training.model_fields_set:
            return {**given, "training": training.model_copy(update={"seed_share": 0.0})}
        return given

    _written: str | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._written = (context or {}).get(PLAN_TEXT)

    @property
    def written(self) -> str | None:
        """The text of the file that it was read from; None of plain values."""
        return self._written

    @property
    def texts(self) -> tuple[TextPlan, ...]:
        """Domains, then targets."""
        return (*self.domains, *self.targets)


def read_plan(source: str | Path | Mapping[str, Any]) -> Plan:
    """The plan in a YAML file, or in plain values as YAML would give them.

    Relative paths begin at the folder of the file; in plain values, at the current folder.

    Raises:
        PlanError: naming every field that is wrong, what was found, what is expected and the remedy; or it is
            neither a file nor plain values.
        UserError: it lies in a Ray job's copy of its working directory, and is not read from the root of that.
    """
    context: dict[str, Any] = {PLAN_FOLDER: opened_folder("")}
    if not isinstance(source, str | Path | Mapping):
        raise PlanError(
            "this is no plan",
            found=type(source).__name__,
            expected="the path of a YAML file, or its keys and values",
        )
    if isinstance(source, Mapping):
        name, values = "the plan", dict(source)
    else:
        name, (values, written) = f"the plan {source}", read_plan_file(Path(source))
        context = {PLAN_FOLDER: opened_folder(Path(source).parent), PLAN_TEXT: written}
    try:
        return Plan.model_validate(values, context=context)
    except ValidationError as exc:
        problems = describe_problems(exc, Plan)
    raise PlanError(f"{name} has {len(problems)} problem(s)\n" + "\n".join(problems))


def plan_schema() -> dict[str, Any]:
    """The JSON schema of a plan, for editors."""
    return {key: _with_bounds(value) for key, value in Plan.model_json_schema().items()}


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_bounds(schema: Any) -> Any:
    """With JSON schema's names of bounds; pydantic leaves its own where a value is read before it is checked."""
    if isinstance(schema, list):
        return [_with_bounds(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {_BOUNDS.get(key, key): _with_bounds(value) for key, value in schema.items()}
