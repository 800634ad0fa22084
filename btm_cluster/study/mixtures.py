"""Every way to mix the models of a forest, or of a rival, on test text: posteriors and priors, gates, single experts.

Asks for a mixture of each text's scores, where all ways are fitted; `steps/mix.py` does it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from btm_cluster.driver import Driver
from btm_cluster.evaluation import ModelScores, stack_of
from btm_cluster.ground import Ground, PreparedText
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import FitForAll, MixRequest, MixText, ScoredSplit, Way
from btm_cluster.steps.mix import PRIORS, SUMS


@dataclass(frozen=True)
class Members:
    """Models that are combined: a forest's experts, or DEMix's parts."""

    system: str
    seed_share: float | None
    seed: Ref | None
    models: tuple[tuple[str, Ref], ...]
    """By domain."""
    many_ways: bool = False
    """Whether every way to mix them is measured, or few."""
    gated: bool = False
    """Whether the learned gate is, beside the few."""
    averaged: bool = True
    """Whether averages of their parameters are measured too; those of models without a seed are noise, which is measured."""

    @property
    def name(self) -> str:
        """As progress calls them: a study may have several of a system."""
        return f"{self.system} of {self.models[0][1].identity[:8]}"

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The models alone."""
        return tuple(model for _, model in self.models)

    @property
    def ways(self) -> tuple[Way, ...]:
        """In which they are mixed."""
        weights = (PRIOR_ALONE,) if self.averaged or self.gated else ()
        gates = (GATE_FOR_ALL, GATE) if self.gated or self.many_ways else ()
        return (*FEW_WAYS, *weights, *(MORE_WAYS if self.many_ways else ()), *gates)


@dataclass(frozen=True)
class System:
    """A row: a model, or a way to combine several."""

    system: str
    seed_share: float | None = None
    posterior: str | None = None
    prior: str | None = None
    development_blocks: int | None = None
    """On which it was fitted, where that is not the plan's number."""
    top_k: int | None = None


THE_PAPERS = Way("full", "ema")
CALIBRATED = Way("calibrated", "fitted")
PRIOR_ALONE = Way("none", "fitted")
DISCOUNTS = Way("discounts", "fitted")
GATE = Way("gate", "fitted")
GATE_FOR_ALL = replace(GATE, is_for_all=True)
FEW_WAYS = (THE_PAPERS, Way("last-token", "ema"), CALIBRATED)
MORE_WAYS = (
    Way("full", "uniform"),
    Way("window", "ema"),
    Way("last-token", "uniform"),
    Way("calibrated", "uniform"),
    Way("fixed-share", "uniform"),
    DISCOUNTS,
    *(replace(way, development_blocks=blocks) for way in (CALIBRATED, DISCOUNTS, GATE) for blocks in (3, 10, 30)),
    *(replace(way, top_k=k) for way in (THE_PAPERS, CALIBRATED) for k in (1, 2, 4)),
    *(replace(way, is_for_all=True) for way in (CALIBRATED, DISCOUNTS)),
)

Rows = dict[System, dict[str, torch.Tensor]]
"""Summed log-probability by document [D], by text, of each system."""


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of several members on every text, as they were committed."""

    ledger: Ledger
    committed: Mapping[tuple[Members, str], Artifact]

    def rows(self) -> Rows:
        """A row for each way to mix each of the members."""
        rows: Rows = {}
        for (members, text), mixture in self.committed.items():
            sums_WD = np.load(self.ledger.open_file(mixture, SUMS))
            for way, sums_D in zip(members.ways, sums_WD, strict=True):
                rows.setdefault(_system(members, way), {})[text] = torch.from_numpy(sums_D)
        return rows

    def prior(self, members: Members, text: PreparedText, way: Way) -> torch.Tensor:
        """The prior of a way, as it was fitted for a text: [E]."""
        priors_WE = np.load(self.ledger.open_file(self.committed[members, text.name], PRIORS))
        return torch.from_numpy(priors_WE[members.ways.index(way)]).exp()


def mix(ground: Ground, scores: ModelScores, everyone: Sequence[Members], driver: Driver) -> Mixtures:
    """Mixes each of the members on every text."""
    merging = ground.plan.merging

    def scored(members: Members, text: PreparedText, split: str) -> ScoredSplit:
        refs = tuple(scores[model.identity, text.name, split].ref for model in members.refs)
        return ScoredSplit(refs, text.tokens[split])

    fits = {
        members: {
            way.posterior: FitForAll(
                f"{way.posterior} for all texts under {members.name}",
                way.posterior,
                tuple(scored(members, domain, "development") for domain in ground.domains),
                merging,
            )
            for way in members.ways
            if way.is_for_all
        }
        for members in everyone
    }
    wanted = {
        (members, text.name): MixText(
            f"{text.name} under {members.name}",
            scored(members, text, "development"),
            scored(members, text, "test"),
            members.ways,
            tuple((posterior, fit.ref) for posterior, fit in fits[members].items()),
            merging,
        )
        for members, text in product(everyone, ground.texts)
    }
    first: list[MixRequest] = [fit for of_members in fits.values() for fit in of_members.values()]
    first += [request for request in wanted.values() if not request.for_all]
    driver.require(driver.workers.mix, first)
    mixed = driver.require(driver.workers.mix, list(wanted.values()))
    return Mixtures(driver.ledger, dict(zip(wanted, mixed, strict=True)))


def single_experts(ground: Ground, scores: ModelScores, forest: Members, driver: Driver) -> Rows:
    """The expert that is best on a text's development blocks, and the domain's own."""

    def rows_of(text: PreparedText) -> Iterator[tuple[System, torch.Tensor]]:
        sums_ED = stack_of(driver.ledger, scores, forest.refs, text, "test").sums()
        best = int(stack_of(driver.ledger, scores, forest.refs, text, "development").sums().sum(1).argmax())
        yield System("best single expert", forest.seed_share), sums_ED[best]
        for expert, (domain, _) in enumerate(forest.models):
            if domain == text.name:
                yield System("own expert", forest.seed_share), sums_ED[expert]

    rows: Rows = {}
    for text in ground.texts:
        for system, sums_D in rows_of(text):
            rows.setdefault(system, {})[text.name] = sums_D
    return rows


def _system(members: Members, way: Way) -> System:
    prior = "uniform, one setting for all" if way.is_for_all else way.prior
    return System(members.system, members.seed_share, way.posterior, prior, way.development_blocks, way.top_k)
