"""Sections of a plan on what is trained: tokenizer, model, training and branching."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from btm_cluster.plan import rules as plan_rules
from btm_cluster.plan.section import Section
from btm_cluster.plan.trains import ALL_LINEAR
from btm_cluster.plan.values import (
    Config,
    FolderOrName,
    Modules,
    Positive,
    PositiveReal,
    Real,
    Share,
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
    pretrained: FolderOrName | None = None
    """Hub name or local folder. Its tokenizer.json is used as it is."""
    first_token: Text | None = None
    """The token after which every block is read, such as <bos>, of a pretrained tokenizer. Without it, the
    one that transformers puts before a text by this tokenizer, or else its end-of-text token."""


Preset = Literal["gpt3-125m", "gpt3-350m", "gpt3-750m", "gpt3-1.3b"]


class ModelPlan(Section):
    """Exactly one of `preset`, `config` and `pretrained`."""

    rules: ClassVar = plan_rules.model_rules
    preset: Preset | None = None
    """A size of the paper: GPT-3 architecture, no dropout, tied embeddings."""
    config: Config | None = None
    """Fields of a transformers configuration, such as {model_type: gpt2,
    n_layer: 4, n_embd: 256, n_head: 4}."""
    pretrained: FolderOrName | None = None
    """Hub name or local folder of a causal language model, which then is the seed: `training.seed_share` is 0
    unless written. On a cluster every node must have the folder."""


class TrainingPlan(Section):
    """The recipe shared by seed, experts and Transformer-LM.

    Defaults are the paper's 125M recipe, but for `gradient_clip`.
    """

    rules: ClassVar = plan_rules.training_rules
    block_tokens: Annotated[Positive, Field(ge=8, le=2**24)] = 1024
    """Tokens per block, packed without padding."""
    updates: Positive = 80_000
    """Whole budget: seed updates and then expert updates."""
    seed_share: Share = 0.5
    """Share of `updates` that the seed takes. Default: the paper's. Small models here did best at 0.75
    (docs/results.md); `btm init` writes that. With `model.pretrained` it is 0 unless written: experts then train
    all `updates`. If written, it is the part of the learning-rate schedule that the pretrained model counts as
    having behind it."""
    blocks_per_domain_update: Positive = 128
    """Blocks an expert takes per update; seed and Transformer-LM take this times the
    number of founding domains."""
    learning_rate: PositiveReal = 5e-4
    """Peak, reached after the warm-up."""
    warmup_share: Share = 0.08
    """Share of the whole budget over which the learning rate rises; afterwards it falls linearly to 0. A
    branch with fresh Adam moments, of an average or a pretrained model, rises to that line over a hundredth
    of its own updates."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """AdamW's β₁ and β₂; the paper's."""
    epsilon: PositiveReal = 1e-7
    """AdamW's ε; the paper's."""
    weight_decay: Real = 0.1
    """Decoupled, on matrices only."""
    gradient_clip: PositiveReal = 1.0
    """Largest gradient norm. The paper's released recipe clips at 0.1; 1.0 is the field's habit."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices of the layers, with steps as large as AdamW's, so that learning rate and weight
    decay are the same; AdamW for embeddings, output matrix, vectors and adapters. It keeps one moment of a matrix
    instead of two, and needs whole matrices: no sharding.

    Source: Liu et al., 2025, Muon is scalable for LLM training.
    """
    random_seed: Annotated[Whole, Field(lt=2**63)] = 0
    """Initial weights and block order."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type in which models are stored. bfloat16 halves them, and rounds each weight to 8 bits of precision;
    training itself and its checkpoints stay float32, and averages are summed so. An expert that keeps its seed's
    optimizer goes on from float32 in all that it trains; its frozen weights, and any start without that
    optimizer (`optimizer: reset`, an average), are the rounded ones."""

    @property
    def seed_updates(self) -> int:
        """Updates of the seed phase, s·U rounded."""
        return round(self.seed_share * self.updates)


class LoraPlan(Section):
    """The adapter of a LoRA expert: ΔW = alpha/rank · B·A beside each adapted weight W."""

    rules: ClassVar = plan_rules.lora_rules
    rank: Positive = 16
    """Rows of A, columns of B. Enough for a domain of some million tokens; more text needs more: 64 to 256."""
    alpha: PositiveReal = 32.0
    """ΔW is scaled by alpha/rank: by 2 at rank 16, as is the habit. Where it stays as the rank changes, so does
    the best learning rate.

    Source: Schulman et al., 2025, LoRA Without Regret.
    """
    modules: Modules = (ALL_LINEAR,)
    """Linear layers that are adapted: names such as [q_proj, v_proj], or PEFT's `all-linear` alone, all of the
    decoder layers. Adapters beside attention alone, LoRA's first habit, learn less at equal size (same source)."""


LORA_RATE_SCALE = 10.0
"""The best learning rate of LoRA over that of training the whole model, whatever the model's size.

Source: Schulman et al., 2025, LoRA Without Regret.
"""


class BranchingPlan(Section):
    """How an expert starts and is trained.

    The first batch starts from the seed. Experts that a forest has stay as they are.
    """

    rules: ClassVar = plan_rules.branching_rules
    train: Literal["all", "feed-forward", "lora"] = "all"
    """The weights that experts change of the model that they start from: all of it, the feed-forwards of its
    layers, or adapters of low rank (LoRA). The rest is frozen and shared: an expert stores what it changed and
    nothing more. Seed, Transformer-LM and DEMix train all."""
    lora: LoraPlan | None = None
    """The adapter of `train: lora`; without it, one of rank 16 beside every linear layer."""
    start: Literal["seed", "posterior", "uniform"] = "posterior"
    """Where an expert starts whose domain is added to a forest that has experts: the seed, or the average of
    the current experts weighted by their posterior on the new domain, or uniformly. Unless this is written,
    it is the seed for experts that do not train all: an average is a whole model to store for each of them."""
    optimizer: Literal["keep", "reset"] = "keep"
    """Continue the seed's Adam moments and learning-rate line, or start the moments anew and rise to the line
    again. There are none to keep of an average, a pretrained model, or the new matrices of LoRA."""
    learning_rate_scale: PositiveReal = 1.0
    """An expert's learning rate over the seed's at the same update; the paper: 1. With more, experts leave
    their seed further behind and differ more, with less they stay closer to it; which is better depends on
    how they are mixed. Unless this is written, it is 10 with LoRA: `training.learning_rate` stays the one by
    which the whole model would be trained."""

    @model_validator(mode="before")
    @classmethod
    def _settle_for_deltas(cls, given: Any) -> Any:
        """Fills in what is not written, by what experts train."""
        # Before the fields: `__init__` keeps nothing of another object that is returned after them.
        if not isinstance(given, Mapping):
            return given
        settled: dict[str, Any] = {}
        if given.get("train") in ("feed-forward", "lora"):
            settled["start"] = "seed"
        if given.get("train") == "lora":
            settled["learning_rate_scale"] = LORA_RATE_SCALE
        return settled | dict(given)
