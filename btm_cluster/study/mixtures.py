"""Every way to mix the models of a forest, or of a rival, on test text: posteriors and priors, single experts, gates.

Pure arithmetic on stored scores. What is fitted is fitted on a text's development blocks, or, one setting for all, on the
domains' development blocks alone, which is what a text without any of its own gets.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Literal, TypeAlias

import torch

from btm_cluster.driver import Driver
from btm_cluster.equations.gates import Gate, fit_discounts, fit_fixed_share
from btm_cluster.equations.learned_gate import LearnedGate, TextScores, fit_gate_for_all, tune_gate
from btm_cluster.equations.posterior import PriorKind, keep_top
from btm_cluster.evaluation import Mixing, ModelScores, PosteriorName, fit_mixing, shared_mixing, stack_of
from btm_cluster.ground import Ground, PreparedText
from btm_cluster.ledger import Ref
from btm_cluster.plan import MergingPlan
from btm_cluster.scores import ScoreStack


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


@dataclass(frozen=True)
class Way:
    """A way to mix models: the posterior, how its prior comes about, on how many development blocks, and of how many models."""

    posterior: PosteriorName | Literal["fixed-share", "discounts", "gate"]
    prior: PriorKind
    development_blocks: int | None = None
    top_k: int | None = None
    is_for_all: bool = False
    """One setting for all texts, fitted on the domains' development blocks alone; then the prior is uniform."""


THE_PAPERS = Way("full", "ema")
CALIBRATED = Way("calibrated", "fitted")
DISCOUNTS = Way("discounts", "fitted")
GATE = Way("gate", "fitted")
GATE_FOR_ALL = replace(GATE, is_for_all=True)
FEW_WAYS = (THE_PAPERS, Way("last-token", "ema"), CALIBRATED)
MORE_WAYS = (
    Way("full", "uniform"),
    Way("window", "ema"),
    Way("last-token", "uniform"),
    Way("none", "fitted"),
    Way("calibrated", "uniform"),
    Way("fixed-share", "uniform"),
    DISCOUNTS,
    *(replace(way, development_blocks=blocks) for way in (CALIBRATED, DISCOUNTS) for blocks in (3, 10, 30)),
    *(replace(way, top_k=k) for way in (THE_PAPERS, CALIBRATED) for k in (1, 2, 4)),
)

Fitted: TypeAlias = Mixing | Gate
Rows = dict[System, dict[str, torch.Tensor]]
"""Summed log-probability by document [D], by text, of each system."""


def mixtures(ground: Ground, scores: ModelScores, members: Members, is_first: bool, driver: Driver) -> Rows:
    """Few ways to mix the members, or many; and single experts of the forest that everything is compared with."""
    refs = [model for _, model in members.models]
    merging = ground.plan.merging
    stacks = {
        (text.name, split): stack_of(driver.ledger, scores, refs, text, split)
        for text in ground.texts
        for split in ("development", "test")
    }
    samples = {text.name: stacks[text.name, "development"].sample(merging.development_blocks) for text in ground.texts}

    def of_text(text: PreparedText) -> dict[System, torch.Tensor]:
        test, sample = stacks[text.name, "test"], samples[text.name]
        fitted = fit_all(FEW_WAYS, sample, merging)
        if members.many_ways:
            fitted |= fit_all(MORE_WAYS, sample, merging)
        gate = for_all.get(GATE_FOR_ALL)
        if isinstance(gate, LearnedGate):
            fitted |= {**for_all, GATE: tune_gate(sample, gate)}
        rows = {_system(members, way): _sums(test, one) for way, one in fitted.items()}
        if is_first:
            best = int(stacks[text.name, "development"].sums().sum(1).argmax())
            rows[System("best single expert", members.seed_share)] = test.sums()[best]
            own = [i for i, (domain, _) in enumerate(members.models) if domain == text.name]
            rows |= {System("own expert", members.seed_share): test.sums()[i] for i in own}
        return rows

    rows: Rows = {}
    with one_thread_each() as pool:
        of_domains = [samples[text.name] for text in ground.domains]
        for_all = _fit_for_all(of_domains, merging, members, pool)
        for text, found in zip(ground.texts, pool.map(of_text, ground.texts), strict=True):
            for system, sums_D in found.items():
                rows.setdefault(system, {})[text.name] = sums_D
    return rows


def fit_all(ways: Sequence[Way], sample: TextScores, merging: MergingPlan) -> dict[Way, Fitted]:
    """Each way, fitted on a text's development blocks; ways that differ in their top k share a fit."""
    fitted = {way: fit(way, sample, merging) for way in dict.fromkeys(replace(way, top_k=None) for way in ways)}

    def cut(way: Way) -> Fitted:
        one = fitted[replace(way, top_k=None)]
        return replace(one, log_prior_E=keep_top(one.log_prior_E, way.top_k)) if isinstance(one, Mixing) else one

    return {way: cut(way) for way in ways}


def fit(way: Way, sample: TextScores, merging: MergingPlan) -> Fitted:
    """A way with all models, fitted on a text's development blocks in hash order."""
    blocks = way.development_blocks or merging.development_blocks
    logp_EBT, mask_BT = sample.logp_EBT[:, :blocks], sample.mask_BT[:blocks]
    if way.posterior == "fixed-share":
        return fit_fixed_share(logp_EBT, mask_BT)
    if way.posterior == "discounts":
        return fit_discounts(logp_EBT, mask_BT)
    assert way.posterior != "gate", "a gate is tuned from the one for all"
    return fit_mixing(way.posterior, way.prior, logp_EBT, mask_BT, merging)


def _fit_for_all(
    samples: Sequence[TextScores], merging: MergingPlan, members: Members, pool: ThreadPoolExecutor
) -> dict[Way, Fitted]:
    fits: dict[Way, Future[Fitted]] = {}
    if members.many_ways or members.gated:
        fits[GATE_FOR_ALL] = pool.submit(fit_gate_for_all, samples)
    if members.many_ways:
        logp_EBT = torch.cat([sample.logp_EBT for sample in samples], dim=1)
        mask_BT = torch.cat([sample.mask_BT for sample in samples])
        pairs = [(sample.logp_EBT, sample.mask_BT) for sample in samples]
        fits[replace(CALIBRATED, is_for_all=True)] = pool.submit(shared_mixing, pairs, merging)
        fits[replace(DISCOUNTS, is_for_all=True)] = pool.submit(fit_discounts, logp_EBT, mask_BT, fits_prior=False)
    return {way: fit.result() for way, fit in fits.items()}


def _system(members: Members, way: Way) -> System:
    prior = "uniform, one setting for all" if way.is_for_all else way.prior
    return System(members.system, members.seed_share, way.posterior, prior, way.development_blocks, way.top_k)


def _sums(test: ScoreStack, fitted: Fitted) -> torch.Tensor:
    if isinstance(fitted, Mixing):
        return test.mixture_sums(fitted.log_prior_E, fitted.posterior)
    return test.gated_sums(fitted)


@contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool for as many fits at once as there are cores: each is too small to be spread over several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cpu_count()) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
