"""Requests of the verbs *score* and *mix*: models and token blocks to log-probabilities, and those of several models to one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeAlias

from btm_cluster.ledger import Ref
from btm_cluster.plan import MergingPlan
from btm_cluster.requests.models import Resources
from btm_cluster.requests.request import StepRequest


@dataclass(frozen=True)
class ScoreRequest(StepRequest):
    """Score one split of one text under one model: a log-probability and an entropy per token."""

    kind: ClassVar[str] = "scores"
    label: str
    model: Ref
    tokens: tuple[Ref, ...]
    how: Resources

    @property
    def recipe(self) -> Mapping[str, Any]:
        tokens = [ref.identity for ref in self.tokens]
        return {"model": self.model.identity, "tokens": tokens, "of_each_token": ["logp", "entropy"]}


@dataclass(frozen=True)
class Way:
    """A way to mix models: the posterior, how its prior comes about, on how many development blocks, and of how many models."""

    posterior: str
    """One of the plan's posteriors, `none` (the prior alone), or a gate: `fixed-share`, `discounts`, `gate`."""
    prior: str
    development_blocks: int | None = None
    """On which it is fitted, where that is not the plan's number."""
    top_k: int | None = None
    is_for_all: bool = False
    """One setting for all texts, fitted on the domains' development blocks alone; then the prior is uniform."""


@dataclass(frozen=True)
class ScoredSplit:
    """One split of one text as several models scored it, in their order."""

    scores: tuple[Ref, ...]
    tokens: tuple[Ref, ...]


FITS = 1
"""The way fits are made. Raise it where a change of theirs must reach the studies that were run before."""


@dataclass(frozen=True)
class FitForAll(StepRequest):
    """Fit what a text without development text of its own is mixed by."""

    kind: ClassVar[str] = "fit-for-all"
    label: str
    posterior: str
    """`calibrated`, `discounts` or `gate`."""
    domains: tuple[ScoredSplit, ...]
    """The domains' development text."""
    merging: MergingPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"posterior": self.posterior, **_mixing_recipe(self.domains, self.merging)}


@dataclass(frozen=True)
class MixText(StepRequest):
    """Mix several models' scores of one text in several ways.

    The artifact has, by way, the summed log-probability of each test document and the log-prior that was fitted for it.
    """

    kind: ClassVar[str] = "mixture"
    label: str
    development: ScoredSplit
    test: ScoredSplit
    ways: tuple[Way, ...]
    for_all: tuple[tuple[str, Ref], ...]
    """By posterior: the fits of those ways that are one setting for all. A text's own gate sets out from the one for all."""
    merging: MergingPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        ways = [asdict(way) for way in self.ways]
        for_all = {posterior: ref.identity for posterior, ref in self.for_all}
        return {"ways": ways, "for_all": for_all, **_mixing_recipe((self.development, self.test), self.merging)}


@dataclass(frozen=True)
class TuneGate(StepRequest):
    """Tune the gate for all texts to one of them, on its development text."""

    kind: ClassVar[str] = "gate"
    label: str
    development: ScoredSplit
    for_all: Ref
    merging: MergingPlan

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"for_all": {"gate": self.for_all.identity}, **_mixing_recipe((self.development,), self.merging)}


def _mixing_recipe(splits: Sequence[ScoredSplit], merging: MergingPlan) -> dict[str, Any]:
    """Scores say which tokens they are of."""
    settings = merging.model_dump(mode="json", include={"development_blocks", "window_tokens", "discount"})
    return {"scores": [[ref.identity for ref in split.scores] for split in splits], "fits": FITS, **settings}


MixRequest: TypeAlias = FitForAll | MixText | TuneGate
