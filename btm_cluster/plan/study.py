"""Sections of a plan for `btm study`: sizes, trials and controls."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from btm_cluster.plan import rules as plan_rules
from btm_cluster.plan.search import SearchPlan
from btm_cluster.plan.section import Section
from btm_cluster.plan.training import BranchingPlan, ModelPlan, TrainingPlan
from btm_cluster.plan.values import (
    Name,
    Positive,
    PositiveReal,
    Share,
    Whole,
)


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


class GrowthPlan(Section):
    """A forest that grows in a study: founded on some domains, with the others added one by one, as `btm expand`
    adds them. For the first size and random seed."""

    rules: ClassVar = plan_rules.growth_rules
    founders: Annotated[Positive, Field(ge=2)]
    """Domains that the forest is founded on: the first so many of the plan. The others come in the plan's order."""
    starts: Annotated[tuple[Literal["posterior", "seed", "uniform"], ...], Field(min_length=1)] = (
        "posterior",
        "seed",
        "uniform",
    )
    """Where an added domain's expert starts, as `branching.start`: a forest for each of these."""
    remove: tuple[Name, ...] = ()
    """Domains that are taken out again in the end."""


class StudyPlan(Section):
    """The comparison of `btm study`. Each size is trained once for each random seed."""

    rules: ClassVar = plan_rules.study_rules
    sizes: tuple[SizePlan, ...] = ()
    """Model sizes; without any, the plan's own model and recipe."""
    trials: tuple[TrialPlan, ...] = ()
    """Recipes tried on the Transformer-LM alone, with each size and the first random seed: all systems are
    then trained by the one with the lowest perplexity on the domains' development text, so that no baseline is
    handicapped. One that diverges is out of the running."""
    search: SearchPlan | None = None
    """Instead of `trials`: a space that Ray Tune draws recipes from. It stops those that lose early."""
    learning_rate_scales: tuple[PositiveReal, ...] = ()
    """Values of `branching.learning_rate_scale` tried on the forest alone, with each size and the first
    random seed, after the recipes: all experts that branch from a seed take the one whose ensemble, mixed as
    `merging` says (by the calibrated posterior for a gate), has the lowest perplexity on the domains'
    development text. Where that is not 1, the Transformer-LM is trained from the seed on at the experts' rate
    too, as a control."""
    branching: tuple[BranchingPlan, ...] = ()
    """Other ways to train experts, each a section like the plan's `branching`: a forest more of the same seed
    and the same tokens, with rows of its own. For instance [{train: all}, {train: feed-forward}, {train: lora,
    lora: {rank: 8}}]. Of each, `learning_rate_scales` times its own are tried."""
    systems: tuple[
        Literal[
            "demix", "demix-from-seed", "random-split", "early-stopping", "adapted", "mixture-of-experts"
        ],
        ...,
    ] = (
        "demix",
        "demix-from-seed",
        "random-split",
        "early-stopping",
        "adapted",
    )
    """Baselines and controls beside forest and Transformer-LM: DEMix; a DEMix that branches from the seed, as
    experts do; a forest of random splits; experts each stopped at the milestone that is best on their domain's
    development text, as the Transformer-LM is; Transformer-LM and forest both trained on each text's development
    blocks. And the forest, and each one of `branching`, as a mixture of experts, routed to one and to two: it
    needs a llama, mistral, qwen2, qwen3 or olmo2."""
    growth: GrowthPlan | None = None
    """A forest that is grown step by step is measured, too: after each step on all texts, against a Transformer-LM
    that is retrained on the domains so far, and in the end against the forest that is grown at once."""
    random_seeds: Annotated[tuple[Whole, ...], Field(min_length=1)] = (0,)
    """Repeats: initial weights and block order."""
    seed_shares: tuple[Share, ...] = ()
    """Forests from seeds of these shares too, for the first size and random seed: the paper's figure 1. With
    a share of 0 each expert starts from a random initialisation of its own."""
