"""What a study compares on test text: every system of one size and random seed, and many ways to combine its models.

Asks the workers for scores and averages; the rest is arithmetic on scores. Whatever is fitted or chosen is so on development
text. `study.py` says which models there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from os import cpu_count
from typing import Any

import torch

from btm_cluster.driver import Driver
from btm_cluster.equations.averaging import argmax_weights, posterior_weights, uniform_weights
from btm_cluster.equations.posterior import PriorKind, keep_top, log_prior
from btm_cluster.evaluation import (
    FULL,
    Mixing,
    ModelScores,
    PosteriorName,
    fit_mixing,
    score_models,
    shared_mixing,
    stack_of,
)
from btm_cluster.ledger import Ref
from btm_cluster.plan import MergingPlan
from btm_cluster.recipes import Ground, PreparedText, average_of
from btm_cluster.report import TRANSFORMER_LM, Cell, SplitResult, verdict
from btm_cluster.workers import AverageRequest


@dataclass(frozen=True)
class Members:
    """Models that are combined: a forest's experts, or DEMix's parts."""

    system: str
    seed_share: float | None
    seed: Ref | None
    models: tuple[tuple[str, Ref], ...]
    """By domain."""
    averaged: bool = True
    """Whether averages of their parameters are measured too; those of models without a seed are noise, which is measured."""


@dataclass(frozen=True)
class Models:
    """All models of one size and random seed."""

    transformer_lm: Ref
    members: tuple[Members, ...]
    """The first is the forest that everything is compared with."""


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

    posterior: PosteriorName
    prior: PriorKind
    development_blocks: int | None = None
    top_k: int | None = None


THE_PAPERS = Way("full", "ema")
CALIBRATED = Way("calibrated", "fitted")
FEW_WAYS = (THE_PAPERS, Way("last-token", "ema"), CALIBRATED)
MANY_WAYS = (
    *FEW_WAYS,
    Way("full", "uniform"),
    Way("window", "ema"),
    Way("last-token", "uniform"),
    Way("none", "fitted"),
    Way("calibrated", "uniform"),
    *(Way("calibrated", "fitted", blocks) for blocks in (3, 10, 30)),
    *(Way("full", "ema", top_k=k) for k in (1, 2, 4)),
    *(Way("calibrated", "fitted", top_k=k) for k in (1, 2, 4)),
)
ONE_FOR_ALL = "uniform, one setting for all"
"""The prior of what is fitted on the domains' development text alone: what a text without any gets."""

Rows = dict[System, dict[str, torch.Tensor]]
"""Summed log-probability by document [D], by text, of each system."""


@dataclass(frozen=True)
class Comparison:
    """Every system's sums on test text."""

    rows: Rows
    texts: tuple[PreparedText, ...]
    tokens: Mapping[str, torch.Tensor]
    """Of each document [D], by text."""

    def entries(self) -> Iterator[dict[str, Any]]:
        """A row of plain values for each system: perplexities, and the difference to the Transformer-LM with its interval."""
        names = {_name(system): system for system in self.rows}
        results = [
            SplitResult(
                text.name,
                text.is_target,
                "test",
                {name: self.rows[s][text.name] for name, s in names.items() if text.name in self.rows[s]},
                self.tokens[text.name],
            )
            for text in self.texts
        ]
        for row in verdict(results).rows["test"]:
            means = {entry: row.means.get(group) for entry, group in _GROUPS.items()}
            whole = row.means.get("all")
            yield asdict(names[row.system]) | {
                **{entry: _rounded(cell) for entry, cell in means.items()},
                "per_domain": {text: _rounded(cell) for text, cell in row.cells.items()},
                "difference": whole and whole.difference,
                "difference_interval": whole and whole.difference_interval,
            }


_GROUPS = {"train": "domains", "eval": "targets", "all": "all"}


def _name(system: System) -> str:
    """One name per system; the Transformer-LM's is what differences are taken to."""
    if system == System("transformer-lm"):
        return TRANSFORMER_LM
    return " ".join(f"{name}={value}" for name, value in asdict(system).items() if value is not None)


def _rounded(cell: Cell | None) -> float | None:
    return None if cell is None else round(cell.perplexity, 4)


def compare(ground: Ground, models: Models, driver: Driver) -> Comparison:
    """Scores every model on the held-out text, combines them, averages them, and scores the averages."""
    seeds = {m.seed_share: m.seed for m in models.members if m.seed}
    combined = dict.fromkeys(model for members in models.members for _, model in members.models)
    everywhere = [*seeds.values(), models.transformer_lm, *combined]
    scores = score_models(
        ground, [(model, text) for model in dict.fromkeys(everywhere) for text in ground.texts], driver
    )
    rows: Rows = {System("transformer-lm"): _sums(ground, scores, models.transformer_lm, driver)}
    for share, seed in seeds.items():
        rows[System("seed", share)] = _sums(ground, scores, seed, driver)
    for number, members in enumerate(models.members):
        rows |= _mixtures(ground, scores, members, number == 0, driver)
    rows |= _averages(ground, scores, models.members, driver)
    tokens = {
        text.name: stack_of(driver.ledger, scores, [models.transformer_lm], text, "test").tokens()
        for text in ground.texts
    }
    return Comparison(rows, ground.texts, tokens)


def _sums(ground: Ground, scores: ModelScores, model: Ref, driver: Driver) -> dict[str, torch.Tensor]:
    return {text.name: stack_of(driver.ledger, scores, [model], text, "test").sums()[0] for text in ground.texts}


def _mixtures(ground: Ground, scores: ModelScores, members: Members, is_first: bool, driver: Driver) -> Rows:
    """Every way to mix the members, and its single experts where it is the forest that everything is compared with."""
    merging = ground.plan.merging
    refs = [model for _, model in members.models]
    stacks = {
        (t.name, s): stack_of(driver.ledger, scores, refs, t, s) for t in ground.texts for s in ("development", "test")
    }
    samples = {text.name: stacks[text.name, "development"].take(0, merging.development_blocks) for text in ground.texts}
    shared = shared_mixing([samples[text.name] for text in ground.domains], merging) if is_first else None

    def of_text(text: PreparedText) -> dict[System, torch.Tensor]:
        test = stacks[text.name, "test"]
        rows = {}
        for way in MANY_WAYS if is_first else FEW_WAYS:
            mixing = mix(way, *samples[text.name], merging)
            system = System(
                members.system, members.seed_share, way.posterior, way.prior, way.development_blocks, way.top_k
            )
            rows[system] = test.mixture_sums(mixing.log_prior_E, mixing.posterior)
        if shared is not None:
            system = System(members.system, members.seed_share, "calibrated", ONE_FOR_ALL)
            rows[system] = test.mixture_sums(shared.log_prior_E, shared.posterior)
            best = int(stacks[text.name, "development"].sums().sum(1).argmax())
            rows[System("best single expert", members.seed_share)] = test.sums()[best]
            own = [i for i, (domain, _) in enumerate(members.models) if domain == text.name]
            if own:
                rows[System("own expert", members.seed_share)] = test.sums()[own[0]]
        return rows

    rows: Rows = {}
    with _one_thread_each() as pool:
        for text, found in zip(ground.texts, pool.map(of_text, ground.texts), strict=True):
            for system, sums_D in found.items():
                rows.setdefault(system, {})[text.name] = sums_D
    return rows


def mix(way: Way, logp_EBT: torch.Tensor, mask_BT: torch.Tensor, merging: MergingPlan) -> Mixing:
    """The mixing that a way fits on development blocks in hash order."""
    blocks = way.development_blocks or merging.development_blocks
    mixing = fit_mixing(way.posterior, way.prior, logp_EBT[:, :blocks], mask_BT[:blocks], merging)
    return Mixing(keep_top(mixing.log_prior_E, way.top_k), mixing.posterior)


def _averages(ground: Ground, scores: ModelScores, all_members: Sequence[Members], driver: Driver) -> Rows:
    """Averages of parameters: one for all texts with uniform weights, else one for each text."""
    wanted: list[tuple[System, PreparedText, AverageRequest]] = []
    for members in (members for members in all_members if members.averaged):
        names = {model.identity: domain for domain, model in members.models}
        refs = [model for _, model in members.models]
        for text in ground.texts:
            sample = stack_of(driver.ledger, scores, refs, text, "development").take(
                0, ground.plan.merging.development_blocks
            )
            for prior, weights in _average_weights(*sample).items():
                request = average_of(ground, f"{prior} for {text.name}", names, weights)
                request = replace(request, unrelated=members.seed is None)
                system = System(
                    "average" if members.system == "forest" else f"average of {members.system}", members.seed_share
                )
                wanted.append((System(system.system, system.seed_share, prior=prior), text, request))
    driver.require(driver.workers.average, [request for _, _, request in wanted])
    on_test = score_models(ground, [(request.ref, text) for _, text, request in wanted], driver, ["test"])
    rows: Rows = {}
    for system, text, request in wanted:
        sums_D = stack_of(driver.ledger, on_test, [request.ref], text, "test").sums()[0]
        rows.setdefault(system, {})[text.name] = sums_D
    return rows


def _average_weights(logp_EBT: torch.Tensor, mask_BT: torch.Tensor) -> dict[str, list[float]]:
    """The paper's three, and the posterior by the fitted prior beside the paper's ema."""
    ema_E, fitted_E = (log_prior(kind, logp_EBT, mask_BT, FULL).exp() for kind in ("ema", "fitted"))
    return {
        "uniform": uniform_weights(len(ema_E)),
        "argmax": argmax_weights(ema_E),
        "ema": posterior_weights(ema_E),
        "fitted": posterior_weights(fitted_E),
    }


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A pool for as many fits at once as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cpu_count()) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
