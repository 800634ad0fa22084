"""What the user writes: one YAML file, read into frozen values.

Knows the fields, their units, defaults and reasons; knows nothing of torch, Ray or a store, so that a wrong plan is
refused in a fraction of a second. `read_plan` is the only way in; `problems.py` words what it refuses.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from btm_cluster.errors import PlanError
from btm_cluster.plan import rules as plan_rules
from btm_cluster.plan.expansion import ExpansionPlan
from btm_cluster.plan.file import read_plan_file
from btm_cluster.plan.problems import describe_problems
from btm_cluster.plan.section import Section
from btm_cluster.plan.texts import DomainPlan, ReadingPlan, TextPlan
from btm_cluster.plan.tracking import TrackingPlan
from btm_cluster.plan.values import (
    Config,
    Location,
    Name,
    Positive,
    PositiveReal,
    Real,
    Share,
    Switch,
    Text,
    Whole,
)


class TrainedTokenizerPlan(Section):
    """A byte-level BPE trained on the founding domains' training text."""

    vocabulary: Annotated[Positive, Field(ge=300, le=1_000_000)] = 8192
    """Number of tokens, the end-of-text token included."""
    characters_per_domain: Positive = 20_000_000
    """Training text taken from each domain, so that large domains do not own the vocabulary."""


class TokenizerPlan(Section):
    """Exactly one of `train` and `pretrained`."""

    rules: ClassVar = plan_rules.tokenizer_rules
    train: TrainedTokenizerPlan | None = None
    """Train one on the text of the founding domains."""
    pretrained: Location | None = None
    """Hub name or local folder. Its tokenizer.json is used as it is."""
    first_token: Text | None = None
    """The token after which every block is read, such as <bos>, of a pretrained tokenizer. Without it, the one that transformers
    puts before a text by this tokenizer, or else its end-of-text token."""


Preset = Literal["gpt3-125m", "gpt3-350m", "gpt3-750m", "gpt3-1.3b"]


class ModelPlan(Section):
    """Exactly one of `preset`, `config` and `pretrained`."""

    rules: ClassVar = plan_rules.model_rules
    preset: Preset | None = None
    """A size of the paper: GPT-3 architecture, no dropout, tied embeddings."""
    config: Config | None = None
    """Fields of a transformers configuration, such as {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}."""
    pretrained: Location | None = None
    """Hub name or local folder of a causal language model, which then is the seed: `training.seed_share` is 0 unless written.
    On a cluster every node must have the folder."""


class TrainingPlan(Section):
    """The recipe shared by seed, experts and Transformer-LM. Defaults are the paper's 125M recipe, but for `gradient_clip`."""

    rules: ClassVar = plan_rules.training_rules
    block_tokens: Annotated[Positive, Field(ge=8, le=2**24)] = 1024
    """Tokens per block, packed without padding."""
    updates: Positive = 80_000
    """Whole budget: seed updates and then expert updates."""
    seed_share: Share = 0.5
    """Share of `updates` that the seed takes. The paper: 0.5, robust for ensembles from 0.2 to 0.8; averages want 0.5 to 0.75.
    A pretrained model is a seed already: unless this is written, it is 0 then, and experts train all `updates`. Written, it is the
    part of the learning-rate line that the pretrained model is taken to have behind it: experts go on from there."""
    blocks_per_domain_update: Positive = 128
    """Blocks an expert takes per update; seed and Transformer-LM take this times the number of founding domains."""
    learning_rate: PositiveReal = 5e-4
    """Peak, reached after the warm-up."""
    warmup_share: Share = 0.08
    """Share of the whole budget over which the learning rate rises; afterwards it falls linearly to 0. A branch with fresh Adam
    moments, of an average or a pretrained model, rises to that line over a hundredth of its own updates."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's."""
    epsilon: PositiveReal = 1e-7
    """AdamW's."""
    weight_decay: Real = 0.1
    """Decoupled, on matrices only."""
    gradient_clip: PositiveReal = 1.0
    """Largest gradient norm. The paper's released recipe clips at 0.1; 1.0 is the field's habit."""
    random_seed: Annotated[Whole, Field(lt=2**63)] = 0
    """Initial weights and block order."""

    @property
    def seed_updates(self) -> int:
        """Updates of the seed phase, s·U rounded."""
        return round(self.seed_share * self.updates)


class BranchingPlan(Section):
    """How an expert starts and is trained. The first batch starts from the seed. Experts that a forest has stay as they are."""

    start: Literal["seed", "posterior", "uniform"] = "posterior"
    """Where an expert starts whose domain is added to a forest that has experts: the seed, or the average of the current experts
    weighted by their posterior on the new domain, or uniformly."""
    optimizer: Literal["keep", "reset"] = "keep"
    """Continue the seed's Adam moments and learning-rate line, or start the moments anew and rise to the line again. An average has
    no moments to keep, nor has a pretrained model."""
    learning_rate_scale: PositiveReal = 1.0
    """An expert's learning rate over the seed's at the same update; the paper: 1. With more, experts leave their seed further
    behind and differ more, with less they stay closer to it; which is better depends on how they are mixed."""


class MergingPlan(Section):
    """How experts are combined, and on how much development text that is fitted."""

    rules: ClassVar = plan_rules.merging_rules
    posterior: Literal["calibrated", "full", "last-token", "window", "gate"] = "calibrated"
    """What the posterior sees: `full` is the paper's equation, `last-token` its scorer, `calibrated` weighs the evidence.
    `gate` is a small network instead, learned on development text, on how well and how surely each expert has predicted so far:
    better where it was measured, and some seconds more for each text. It has no use for `prior` and `top_k`; averages are weighted
    as ever."""
    with_seed: bool = False
    """Mix the seed with the experts, as one model more: in `btm generate`, and in a row of its own beside the ensembles of experts
    alone. Worth most where experts learn their text by heart, nothing where they have left a weak seed behind, for one model more
    to run. Averages are of experts."""
    prior: Literal["fitted", "ema", "mean", "uniform"] = "fitted"
    """`ema` is the paper's estimate; `fitted` maximises the likelihood of the development text."""
    average_prior: Literal["fitted", "ema", "mean", "uniform"] = "fitted"
    """By which averages are weighted. The paper's `ema` is near one-hot; `fitted` is softer, and better on unseen targets."""
    development_blocks: Positive = 100
    """Development blocks used for everything fitted, in hash order. The paper: 100."""
    top_k: Positive | None = None
    """Keep only the k experts with the largest prior."""
    window_tokens: Positive = 32
    """Context of the `window` posterior."""
    discount: Annotated[Real, Field(le=1)] = 0.97
    """How much a token of evidence still counts one token later, in the `calibrated` posterior."""
    clusters: Location | None = None
    """Folder of a cluster model of `btm discover` whose clusters are named as the domains: adds the ensemble that weighs
    experts by distance to them to the evaluation."""
    cluster_temperature: PositiveReal = 0.1
    """T of that ensemble's weights, softmax(-dist²/T). c-BTM: 0.1."""


class ClusterPlan(Section):
    """How the work is done. Nothing here is part of an identity."""

    rules: ClassVar = plan_rules.cluster_rules
    seed_gpus: Real = 0
    """GPUs of the seed's and the Transformer-LM's group; 0 trains on CPU. A fraction leaves room on the GPU for experts, whose
    processes then start while the seed is trained."""
    gpus_per_expert: Real = 0
    """GPUs of an expert's group. A fraction lets several experts share a GPU."""
    seed_cpus: Positive = 2
    """CPUs, and so threads, of the seed's whole group."""
    cpus_per_expert: Positive = 1
    """CPUs, and so threads, of an expert's whole group."""
    autoscaling: bool = False
    """The cluster can grow: a demand that it cannot meet yet waits, saying so every minute, instead of being refused."""
    concurrent_experts: Positive | None = None
    """Experts trained at once; without it, as many as there is room for."""
    retries: Whole = 3
    """Times a step is tried again after its process or node died."""
    micro_batch_blocks: Positive = 16
    """Blocks per forward pass; an update accumulates as many as it needs."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on a GPU, float32 on CPU. Weights stay float32."""
    compile: Switch = "auto"
    """torch.compile; `auto` is on for a GPU, off on CPU."""
    checkpoint_minutes: PositiveReal = 15
    """Most training time that a lost machine can cost."""
    hang_minutes: PositiveReal = 30
    """Training that shows no update for so long is killed and tried again, as if its process had died."""
    stop_grace_seconds: PositiveReal = 120
    """Time a stopped run has to save its training checkpoints."""
    price_per_gpu_hour: Real | None = None
    """For `btm plan`."""
    tokens_per_gpu_second: PositiveReal | None = None
    """For `btm plan`; without it, the rate of earlier runs in the store."""


class SizePlan(Section):
    """A model size of a study, with the recipe that suits it."""

    rules: ClassVar = plan_rules.size_rules
    name: Name
    """Shown in the tables."""
    model: ModelPlan
    """Architecture and size."""
    training: TrainingPlan = TrainingPlan()
    """The recipe; its `seed_share` is that of the forest that is compared with everything."""


class TrialPlan(Section):
    """A recipe that a study's Transformer-LM tries; what is not given is the size's own."""

    learning_rate: PositiveReal | None = None
    """Peak of the schedule."""
    updates: Positive | None = None
    """Together with `blocks_per_domain_update`, so that the compute stays the same."""
    blocks_per_domain_update: Positive | None = None
    """Blocks of each domain in an update."""


class StudyPlan(Section):
    """What `btm study` compares. Each size is trained once for each random seed."""

    rules: ClassVar = plan_rules.study_rules
    sizes: tuple[SizePlan, ...] = ()
    """Model sizes; without any, the plan's own model and recipe."""
    trials: tuple[TrialPlan, ...] = ()
    """Recipes tried on the Transformer-LM alone, with each size and the first random seed: all systems are then trained by the
    one with the lowest perplexity on the domains' development text, so that no rival is handicapped. One that diverges is out of
    the running."""
    learning_rate_scales: tuple[PositiveReal, ...] = ()
    """Values of `branching.learning_rate_scale` tried on the forest alone, with each size and the first random seed, after the
    recipes: all experts that branch from a seed take the one whose ensemble, mixed as `merging` says (by the calibrated posterior
    for a gate), has the lowest perplexity on the domains' development text. Where that is not 1, the Transformer-LM is trained
    from the seed on at the experts' rate too, as a control."""
    systems: tuple[Literal["demix", "demix-from-seed", "random-split", "adapted"], ...] = (
        "demix",
        "demix-from-seed",
        "random-split",
        "adapted",
    )
    """Rivals and controls beside forest and Transformer-LM: DEMix; a DEMix that branches from the seed, as experts do; a forest of
    random splits; Transformer-LM and forest both trained on each text's development blocks."""
    random_seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0,)
    """Repeats: initial weights and block order."""
    seed_shares: tuple[Share, ...] = ()
    """Forests from seeds of these shares too, for the first size and random seed: the paper's figure 1. With a share of 0
    each expert starts from a random initialisation of its own."""


class Plan(Section):
    """One forest: its texts, model, recipe and how it is grown."""

    rules: ClassVar = plan_rules.plan_rules
    name: Name
    """Shown in the dashboard and in reports."""
    store: Location
    """Folder, or s3://bucket/prefix. Relative paths are relative to the current folder."""
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
    """Where the experts of later domains start."""
    merging: MergingPlan = MergingPlan()
    """How experts are combined."""
    baselines: tuple[Literal["transformer-lm", "demix"], ...] = ()
    """Rivals trained with the same compute on the same text."""
    cluster: ClusterPlan = ClusterPlan()
    """How the work is done."""
    study: StudyPlan | None = None
    """For `btm study` alone; without it, the plan's own model with all rivals and controls."""
    expansion: ExpansionPlan = ExpansionPlan()
    """How `btm expand` takes what has arrived."""
    tracking: TrackingPlan = TrackingPlan()
    """Where curves go besides the store."""

    @model_validator(mode="after")
    def _settle_seed_share(self) -> Self:
        """A pretrained model is a seed already, so that nothing is kept back for one unless the plan says so."""
        if self.model.pretrained is None or "seed_share" in self.training.model_fields_set:
            return self
        return self.model_copy(update={"training": self.training.model_copy(update={"seed_share": 0.0})})

    @property
    def texts(self) -> tuple[TextPlan, ...]:
        """Domains, then targets."""
        return (*self.domains, *self.targets)


def read_plan(path: str | Path) -> Plan:
    """The plan in the YAML file at `path`.

    Raises:
        PlanError: naming every field that is wrong, what was found, what is expected and the remedy.
    """
    try:
        return Plan.model_validate(read_plan_file(Path(path)))
    except ValidationError as exc:
        problems = describe_problems(exc, Plan)
    raise PlanError(f"the plan {path} has {len(problems)} problem(s)\n" + "\n".join(problems))


def plan_schema() -> dict[str, Any]:
    """The JSON schema of a plan, for editors."""
    return Plan.model_json_schema()
