"""The systems that are compared: single models, and ensembles by mixing method.

One set of names for runs and studies.
"""

from dataclasses import dataclass, replace

from btm_cluster.ledger import Ref
from btm_cluster.plan import MergingPlan
from btm_cluster.requests import MixingMethod

PAPERS = MixingMethod("full", "ema")
CALIBRATED = MixingMethod("calibrated", "fitted")
GATE = MixingMethod("gate", "fitted")
GATE_FOR_ALL = replace(GATE, is_for_all=True)
PRIOR_ALONE = MixingMethod("none", "fitted")
DISCOUNTS = MixingMethod("discounts", "fitted")
FEW_METHODS = (PAPERS, MixingMethod("last-token", "ema"), CALIBRATED)
MANY_METHODS = (
    *FEW_METHODS,
    PRIOR_ALONE,
    MixingMethod("full", "uniform"),
    MixingMethod("window", "ema"),
    MixingMethod("last-token", "uniform"),
    MixingMethod("calibrated", "uniform"),
    MixingMethod("fixed-share", "uniform"),
    DISCOUNTS,
    *(replace(method, development_blocks=n) for method in (CALIBRATED, DISCOUNTS, GATE) for n in (3, 10, 30)),
    *(replace(method, top_k=k) for method in (PAPERS, CALIBRATED) for k in (1, 2, 4)),
    *(replace(method, is_for_all=True) for method in (CALIBRATED, DISCOUNTS)),
    GATE_FOR_ALL,
    GATE,
)
FITTED_FOR_ALL = ("calibrated", "discounts", "gate")
"""Posteriors of which one setting for all texts can be fitted."""


@dataclass(frozen=True)
class System:
    """A row of a comparison: a model, or a way to combine several."""

    system: str
    seed_share: float | None = None
    posterior: str | None = None
    prior: str | None = None
    development_blocks: int | None = None
    """On which it was fitted, where that is not the plan's number."""
    top_k: int | None = None

    @property
    def name(self) -> str:
        """The name that progress shows."""
        routed = "" if self.top_k is None else f", top-{self.top_k}"
        share = "" if self.seed_share is None else f" at seed share {self.seed_share:g}"
        return f"{self.system}{share}{routed}"


FOREST, SEEDED_FOREST, DEMIX = "forest", "forest with its seed", "demix"
FOREST_OF = "forest of "
"""Begins the names of a study's forests of other experts: `forest of LoRA experts of rank 8`."""
MIXTURE_OF_EXPERTS = "mixture of experts"
TRANSFORMER_LM = System("transformer-lm")
BEST_TRANSFORMER_LM = System("transformer-lm at its best milestone")


@dataclass(frozen=True)
class Ensemble:
    """Models that are combined: a forest's experts, or a DEMix's parts."""

    system: str
    models: tuple[tuple[str, Ref], ...]
    """By domain, or as they are called: in order of names, whoever lists them,
    since fits end where sums take them."""
    methods: tuple[MixingMethod, ...]
    averages: tuple[str, ...] = ()
    """Averages of their parameters: `uniform`, `argmax`, a prior by name, or a
    search by its strategy, `greedy` or `learned`."""
    seed: Ref | None = None
    """The model that all of them started from; without one, averages of them are noise."""
    seed_share: float | None = None
    shows_experts: bool = False
    """Whether each expert has a row on its own domain, as those of a comparison's first ensemble always have."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(sorted(self.models, key=lambda model: model[0])))

    @property
    def name(self) -> str:
        """The name that progress shows: a study may have several ensembles of a system."""
        return System(self.system, self.seed_share).name

    @property
    def of_which(self) -> str:
        """Suffix of the names of its models and averages in progress; empty for a run's own forest."""
        is_runs_own = self.system in (FOREST, SEEDED_FOREST) and self.seed_share is None
        return "" if is_runs_own else f" of {self.name}"

    @property
    def names(self) -> dict[Ref, str]:
        """The names that progress shows for its models."""
        return {model: f"{name}{self.of_which}" for name, model in self.models}

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The models alone."""
        return tuple(model for _, model in self.models)

    def mixed_by(self, method: MixingMethod) -> System:
        """The row of a mixing method."""
        prior = "uniform, one setting for all" if method.is_for_all else method.prior
        return System(
            self.system, self.seed_share, method.posterior, prior, method.development_blocks, method.top_k
        )

    def averaged_by(self, weights: str) -> System:
        """The row of an average."""
        return System(self._row("average"), self.seed_share, prior=weights)

    def routed_to(self, experts_per_token: int) -> System:
        """The row of the mixture of experts in which a token passes so many feed-forwards of a layer."""
        return System(self._row(MIXTURE_OF_EXPERTS), self.seed_share, top_k=experts_per_token)

    @property
    def own_expert(self) -> System:
        """The row of each expert on its own domain."""
        return System(self._row("own expert"), self.seed_share)

    def _row(self, name: str) -> str:
        return name if self.system in (FOREST, SEEDED_FOREST) else f"{name} of {self.system}"


def with_seed(forest: Ensemble, methods: tuple[MixingMethod, ...] = ()) -> Ensemble:
    """The experts and the seed that they started from, as one model more."""
    assert forest.seed is not None
    models = (*forest.models, ("the seed", forest.seed))
    return Ensemble(SEEDED_FOREST, models, methods, (), forest.seed, forest.seed_share)


def planned_method(merging: MergingPlan, models: int) -> MixingMethod:
    """The method that a plan asks for."""
    if merging.posterior == "gate":
        return GATE
    top_k = merging.top_k if merging.top_k is not None and merging.top_k < models else None
    return MixingMethod(merging.posterior, merging.prior, top_k=top_k)


def judged_method(merging: MergingPlan, models: int) -> MixingMethod:
    """The method by which recipes and new experts are judged: the plan's, or the
    calibrated posterior where that is a gate."""
    return CALIBRATED if merging.posterior == "gate" else planned_method(merging, models)
