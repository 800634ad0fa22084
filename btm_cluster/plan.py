"""What the user writes: one YAML file, read into frozen values.

Knows the fields, their units, defaults and reasons; knows nothing of torch, Ray or a store, so that a wrong plan is
refused in a fraction of a second. `read_plan` is the only way in; `plan_problems.py` words what it refuses.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from btm_cluster.errors import PlanError
from btm_cluster.plan_problems import describe_problems, name_problems, unique_key_loader

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Files = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Section(BaseModel):
    """A part of the plan: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class DatasetPlan(Section):
    """A Hugging Face data set, by hub name or local folder, streamed through `datasets`."""

    name: str
    """Hub name, or the path of a local folder."""
    configuration: str | None = None
    """The data set's configuration, where it has several."""
    revision: str | None = None
    """Commit or tag on the hub; state it to keep the text from changing under you."""
    split: str = "train"
    """Split that is the text."""
    development_split: str | None = None
    """Split that is development text; without it, a share of the text is."""
    test_split: str | None = None
    """Split that is test text; without it, a share of the text is."""


class TextPlan(Section):
    """A named text. A document is a JSON or Parquet row, or a text file (or its parts, by a delimiter)."""

    name: Name
    """Stands once in a forest: lower-case letters, digits, - and _."""
    text: Files = ()
    """Files or globs, local or s3://: .jsonl .parquet .txt and source text, plain, .gz or .zst."""
    development: Files = ()
    """Development text from given files; without it, a share of `text` by content hash."""
    test: Files = ()
    """Test text from given files; without it, a share of `text` by content hash."""
    dataset: DatasetPlan | None = None
    """A Hugging Face data set instead of files."""
    field: str = "text"
    """Field of a JSON or Parquet row that holds the document."""
    delimiter: str | None = None
    """Cuts text files into documents; without it, a file is a document."""

    @model_validator(mode="after")
    def _has_one_source(self) -> "TextPlan":
        given = bool(self.text or self.development or self.test)
        if given == (self.dataset is not None):
            raise ValueError("needs either files (`text`) or a `dataset`, and not both")
        return self


class DomainPlan(TextPlan):
    """A text that gets an expert of its own."""

    @model_validator(mode="after")
    def _has_training_text(self) -> "DomainPlan":
        if self.dataset is None and not self.text:
            raise ValueError("a domain needs training text: give `text`")
        return self


class ReadingPlan(Section):
    """How texts become documents. Part of a text's identity through the documents that result."""

    development_share: Share = 0.02
    """Share of documents held out for everything that is fitted."""
    test_share: Share = 0.02
    """Share of documents held out for what is reported."""
    longest_document_characters: Positive = 1_000_000
    """Longer documents are bad documents: one such line is more often a mistake than a text."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """A line that is not JSON, lacks the field, is not UTF-8, or is too long: refuse the text, or skip, count and report."""


class TrainedTokenizerPlan(Section):
    """A byte-level BPE trained on the founding domains' training text."""

    vocabulary: Annotated[int, Field(ge=300, le=1_000_000)] = 8192
    """Number of tokens, the end-of-text token included."""
    characters_per_domain: Positive = 20_000_000
    """Training text taken from each domain, so that large domains do not own the vocabulary."""


class TokenizerPlan(Section):
    """Exactly one of `train` and `pretrained`."""

    train: TrainedTokenizerPlan | None = None
    pretrained: str | None = None
    """Hub name or local folder."""

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizerPlan":
        if (self.train is None) == (self.pretrained is None):
            raise ValueError("needs exactly one of `train` and `pretrained`")
        return self


Preset = Literal["gpt3-125m", "gpt3-350m", "gpt3-750m", "gpt3-1.3b"]


class ModelPlan(Section):
    """Exactly one of `preset`, `config` and `pretrained`."""

    preset: Preset | None = None
    """A size of the paper: GPT-3 architecture, no dropout, tied embeddings."""
    config: dict[str, Any] | None = None
    """Fields of a transformers configuration, such as {model_type: gpt2, n_layer: 4, n_embd: 256, n_head: 4}."""
    pretrained: str | None = None
    """Hub name or local folder of a causal language model, which then is the seed."""
    trust_remote_code: bool = False
    """Run code that comes with a pretrained model. Off, since it is somebody else's code."""

    @model_validator(mode="after")
    def _is_one(self) -> "ModelPlan":
        if sum(x is not None for x in (self.preset, self.config, self.pretrained)) != 1:
            raise ValueError("needs exactly one of `preset`, `config` and `pretrained`")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, such as gpt2 or llama")
        return self


class TrainingPlan(Section):
    """The recipe shared by seed, experts and Transformer-LM. Defaults are the paper's 125M recipe."""

    block_tokens: Annotated[int, Field(ge=8)] = 1024
    """Tokens per block, packed without padding."""
    updates: Positive = 80_000
    """Whole budget: seed updates and then expert updates."""
    seed_share: Share = 0.5
    """Share of `updates` that the seed takes. The paper: 0.5, robust for ensembles from 0.2 to 0.8; averages want 0.5 to 0.75."""
    blocks_per_domain_update: Positive = 128
    """Blocks an expert takes per update; seed and Transformer-LM take this times the number of founding domains."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak, reached after the warm-up."""
    warmup_share: Share = 0.08
    """Share of the whole budget over which the learning rate rises; afterwards it falls linearly to 0."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-7
    """AdamW's."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled, on matrices only."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm. The paper's released recipe clips at 0.1; 1.0 is the field's habit."""
    random_seed: int = 0
    """Initial weights and block order."""

    @property
    def seed_updates(self) -> int:
        """Updates of the seed phase, s·U rounded."""
        return round(self.seed_share * self.updates)


class BranchingPlan(Section):
    """Where an expert starts when its domain is added to a forest that has experts. The first batch starts from the seed."""

    start: Literal["seed", "posterior", "uniform"] = "posterior"
    """The seed, or the average of the current experts weighted by their posterior on the new domain, or uniformly."""
    optimizer: Literal["keep", "reset"] = "keep"
    """Continue the seed's Adam moments and learning-rate line, or start them anew. An average has none to keep."""


class MergingPlan(Section):
    """How experts are combined, and on how much development text that is fitted."""

    posterior: Literal["calibrated", "full", "last-token", "window"] = "calibrated"
    """What the posterior sees: `full` is the paper's equation, `last-token` its scorer, `calibrated` weighs the evidence."""
    prior: Literal["fitted", "ema", "mean", "uniform"] = "fitted"
    """`ema` is the paper's estimate; `fitted` maximises the likelihood of the development text."""
    development_blocks: Positive = 100
    """Development blocks used for everything fitted, in hash order. The paper: 100."""
    top_k: Positive | None = None
    """Keep only the k experts with the largest prior."""
    window_tokens: Positive = 32
    """Context of the `window` posterior."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.97
    """How much a token of evidence still counts one token later, in the `calibrated` posterior."""


class ClusterPlan(Section):
    """How the work is done. Nothing here is part of an identity."""

    seed_gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of the seed's and the Transformer-LM's group; 0 trains on CPU."""
    gpus_per_expert: Annotated[float, Field(ge=0)] = 0
    """GPUs of an expert's group. A fraction lets several experts share a GPU."""
    seed_cpus: Positive = 2
    """CPUs, and so threads, of the seed's whole group."""
    cpus_per_expert: Positive = 1
    """CPUs, and so threads, of an expert's whole group."""
    concurrent_experts: Positive | None = None
    """Experts trained at once; without it, as many as there is room for."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Times a step is tried again after its process or node died."""
    micro_batch_blocks: Positive = 16
    """Blocks per forward pass; an update accumulates as many as it needs."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; `auto` is bfloat16 on a GPU, float32 on CPU. Weights stay float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; `auto` is on for a GPU, off on CPU."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 15
    """Most training time that a lost machine can cost."""
    stop_grace_seconds: Annotated[float, Field(gt=0)] = 120
    """Time a stopped run has to save its training checkpoints."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """For `btm plan`."""
    tokens_per_gpu_second: Annotated[float, Field(gt=0)] | None = None
    """For `btm plan`; without it, the rate of earlier runs in the store."""

    @model_validator(mode="after")
    def _whole_groups(self) -> "ClusterPlan":
        if self.gpus_per_expert > 1 and self.gpus_per_expert != int(self.gpus_per_expert):
            raise ValueError("`gpus_per_expert` above 1 must be a whole number: a group's GPUs are whole")
        return self


class Plan(Section):
    """One forest: its texts, model, recipe and how it is grown."""

    name: Name
    """Shown in the dashboard and in reports."""
    store: str
    """Folder, or s3://bucket/prefix. Relative paths are relative to the current folder."""
    domains: Annotated[tuple[DomainPlan, ...], Field(min_length=1)]
    """Texts that get an expert each."""
    targets: tuple[TextPlan, ...] = ()
    """Texts that are evaluated and never trained on."""
    reading: ReadingPlan = ReadingPlan()
    tokenizer: TokenizerPlan
    model: ModelPlan
    training: TrainingPlan = TrainingPlan()
    branching: BranchingPlan = BranchingPlan()
    merging: MergingPlan = MergingPlan()
    baselines: tuple[Literal["transformer-lm"], ...] = ()
    """Rivals trained with the same compute on the same text."""
    cluster: ClusterPlan = ClusterPlan()

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
        document = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise PlanError(f"cannot read the plan {path}", found=str(exc), remedy="`btm init` writes a starter") from exc
    try:
        raw = yaml.load(document, Loader=unique_key_loader())
    except yaml.YAMLError as exc:
        raise PlanError(f"the plan {path} is not YAML", found=" ".join(str(exc).split())) from exc
    if not isinstance(raw, dict):
        raise PlanError(
            f"the plan {path} is not a plan", found=type(raw).__name__, expected="fields such as name, store, domains"
        )
    problems = name_problems(raw)
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as exc:
        problems = describe_problems(exc, Plan) + problems
    if problems:
        raise PlanError(f"the plan {path} has {len(problems)} problem(s)\n" + "\n".join(problems))
    return plan


def plan_schema() -> dict[str, Any]:
    """The JSON schema of a plan, for editors."""
    return Plan.model_json_schema()
