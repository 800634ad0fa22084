"""Requests for scores, for fits of how models are mixed, and for the mixtures of their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from btm_cluster.identity import Inputs, Ref
from btm_cluster.plan import MergingPlan
from btm_cluster.requests.request import Resources, StepRequest

_MERGING = {"development_blocks", "window_tokens", "discount"}


@dataclass(frozen=True)
class ScoreRequest(StepRequest):
    """Score one split of one text under one model: a log-probability and an entropy per token."""

    kind: ClassVar[str] = "scores"
    text: str
    """By name, as the model: both are shown."""
    model_name: str
    model: Ref
    tokens: tuple[Ref, ...]
    how: Resources

    @property
    def label(self) -> str:  # type: ignore[override]
        """The name that a failure goes by."""
        return f"{self.text} under {self.model_name}"

    @property
    def shown(self) -> str:
        return f"with {self.model_name}"

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"of_each_token": ["logp", "entropy"]}

    @property
    def inputs(self) -> Inputs:
        return {"model": (self.model,), "tokens": self.tokens}

    @property
    def batch(self) -> object:
        return self.model  # which is loaded once

    @property
    def group(self) -> Resources:
        return self.how


@dataclass(frozen=True)
class MixingMethod:
    """A way to mix models: the posterior, how its prior comes about, on how many
    development blocks, and of how many models."""

    posterior: str
    """One of the plan's posteriors, `none` (the prior alone), or a gate:
    `fixed-share`, `discounts`, `gate`."""
    prior: str
    development_blocks: int | None = None
    """On which it is fitted, where that is not the plan's number."""
    top_k: int | None = None
    is_for_all: bool = False
    """One setting for all texts, fitted on the domains' development blocks
    alone; then the prior is uniform."""


@dataclass(frozen=True)
class ScoredSplit:
    """One split of one text as several models scored it, in their order."""

    scores: tuple[Ref, ...]
    tokens: tuple[Ref, ...]


FITS = 1
"""The version of the fits' arithmetic.

Raise it where a change must reach the studies that were run before.
"""


@dataclass(frozen=True)
class FitForAll(StepRequest):
    """Fit one setting for all texts, on the development text of the domains together."""

    kind: ClassVar[str] = "fit"
    label: str
    posterior: str
    """`calibrated`, `discounts` or `gate`."""
    domains: tuple[ScoredSplit, ...]
    """The domains' development text."""
    merging: MergingPlan

    @property
    def methods(self) -> tuple[MixingMethod, ...]:
        """The one method that is fitted."""
        return (MixingMethod(self.posterior, "uniform", is_for_all=True),)

    @property
    def recipe(self) -> Mapping[str, Any]:
        return _fit_recipe(self.methods, self.merging) | {"texts": len(self.domains)}

    @property
    def inputs(self) -> Inputs:
        return {"scores": tuple(score for domain in self.domains for score in domain.scores)}

    @property
    def needs(self) -> tuple[Ref, ...]:
        return (*self.inputs["scores"], *(ref for domain in self.domains for ref in domain.tokens))


@dataclass(frozen=True)
class FitText(StepRequest):
    """Fit how several models are mixed for one text, by several methods, on its development text.

    A text without any gets what was fitted for all, and uniform priors. The artifact's facts hold `weights`,
    by name and model: those of averages that the fitted priors give.
    """

    kind: ClassVar[str] = "fit"
    label: str
    models: tuple[Ref, ...]
    development: ScoredSplit
    """Scores in the models' order; none where the text has no development text."""
    methods: tuple[MixingMethod, ...]
    for_all: tuple[Ref, ...]
    """The fits of those methods that are one setting for all.

    A text's own gate sets out from the one for all.
    """
    merging: MergingPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return _fit_recipe(self.methods, self.merging)

    @property
    def inputs(self) -> Inputs:
        return {"models": self.models, "scores": self.development.scores, "for_all": self.for_all}

    @property
    def needs(self) -> tuple[Ref, ...]:
        return (*self.development.scores, *self.development.tokens, *self.for_all)


@dataclass(frozen=True)
class MixText(StepRequest):
    """Mix several models' scores of one split of a text by every method of a fit.

    The artifact has, by method, the summed log-probability of each document.
    """

    kind: ClassVar[str] = "mixture"
    label: str
    fit: Ref
    scored: ScoredSplit
    """In the order of the fit's models."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {}

    @property
    def inputs(self) -> Inputs:
        return {"fit": (self.fit,), "scores": self.scored.scores}

    @property
    def needs(self) -> tuple[Ref, ...]:
        return (self.fit, *self.scored.scores, *self.scored.tokens)


def _fit_recipe(methods: Sequence[MixingMethod], merging: MergingPlan) -> dict[str, Any]:
    settings = merging.model_dump(mode="json", include=_MERGING)
    return {"methods": [asdict(method) for method in methods], "version": FITS, **settings}
