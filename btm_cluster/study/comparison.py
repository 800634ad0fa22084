"""What a study compares on test text: every system of one size and random seed, and many ways to combine its models.

Asks the workers for scores, mixtures and averages; the rest is arithmetic on their sums. Whatever is fitted or chosen is so on
development text. `run.py` and `repeats.py` say which models there are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from btm_cluster.driver import Driver
from btm_cluster.equations.averaging import argmax_weights, posterior_weights, uniform_weights
from btm_cluster.evaluation import ModelScores, score_models, stack_of
from btm_cluster.ground import Ground, PreparedText
from btm_cluster.ledger import Ref
from btm_cluster.recipes import average_of
from btm_cluster.report import TRANSFORMER_LM, Cell, SplitResult, verdict
from btm_cluster.requests import AverageRequest
from btm_cluster.soups import soup_average_request, soup_request
from btm_cluster.study.mixtures import PRIOR_ALONE, THE_PAPERS, Members, Mixtures, Rows, System, mix, single_experts


@dataclass(frozen=True)
class Models:
    """All models of one size and random seed."""

    transformer_lm: Ref
    transformer_lm_at_experts_rate: Ref | None
    """From the seed on; where that rate is another, and it did not diverge."""
    members: tuple[Members, ...]
    """The first is the forest that everything is compared with, the second that forest with its seed."""


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
                "difference": _share(whole.difference) if whole else None,
                "difference_interval": _shares(whole.difference_interval) if whole else None,
            }


_GROUPS = {"train": "domains", "eval": "targets", "all": "all"}


def _name(system: System) -> str:
    """One name per system; the Transformer-LM's is what differences are taken to."""
    if system == System("transformer-lm"):
        return TRANSFORMER_LM
    return " ".join(f"{name}={value}" for name, value in asdict(system).items() if value is not None)


def _share(value: float | None) -> float | None:
    """To what a sum's last bits, which hang on how many rows are summed beside it, cannot reach."""
    return None if value is None else round(value, 6)


def _shares(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [round(value, 6) for value in interval]


def _rounded(cell: Cell | None) -> float | None:
    return None if cell is None else round(cell.perplexity, 4)


def compare(ground: Ground, models: Models, driver: Driver) -> Comparison:
    """Scores every model on the held-out text, combines them, averages them, and scores the averages."""
    seeds = {m.seed_share: m.seed for m in models.members if m.seed}
    single = {System("transformer-lm"): models.transformer_lm}
    if models.transformer_lm_at_experts_rate:
        single[System("transformer-lm at the experts' rate")] = models.transformer_lm_at_experts_rate
    single |= {System("seed", share): seed for share, seed in seeds.items()}
    combined = [model for members in models.members for _, model in members.models]
    scores = score_models(
        ground,
        [(model, text) for model in dict.fromkeys([*single.values(), *combined]) for text in ground.texts],
        driver,
    )
    rows: Rows = {system: _sums(ground, scores, model, driver) for system, model in single.items()}
    rows |= single_experts(ground, scores, models.members[0], driver)
    mixtures = mix(ground, scores, models.members, driver)
    rows |= mixtures.rows() | _averages(ground, mixtures, models.members, driver)
    tokens = {
        text.name: stack_of(driver.ledger, scores, [models.transformer_lm], text, "test").tokens()
        for text in ground.texts
    }
    return Comparison(rows, ground.texts, tokens)


def _sums(ground: Ground, scores: ModelScores, model: Ref, driver: Driver) -> dict[str, torch.Tensor]:
    return {text.name: stack_of(driver.ledger, scores, [model], text, "test").sums()[0] for text in ground.texts}


def _averages(ground: Ground, mixtures: Mixtures, everyone: Sequence[Members], driver: Driver) -> Rows:
    """Averages of parameters, one for each text."""
    wanted: list[tuple[System, PreparedText, AverageRequest]] = []
    for members, text in product((members for members in everyone if members.averaged), ground.texts):
        name = "average" if members.system == "forest" else f"average of {members.system}"
        called = {model.identity: domain for domain, model in members.models}
        for prior, weights in _average_weights(mixtures, members, text).items():
            request = average_of(ground, f"{prior} for {text.name}", called, weights)
            request = replace(request, unrelated=members.seed is None)
            wanted.append((System(name, members.seed_share, prior=prior), text, request))
    wanted += _soups(ground, mixtures, everyone[0], everyone[1], driver)
    driver.require(driver.workers.average, [request for _, _, request in wanted])
    on_test = score_models(ground, [(request.ref, text) for _, text, request in wanted], driver, ["test"])
    rows: Rows = {}
    for system, text, request in wanted:
        sums_D = stack_of(driver.ledger, on_test, [request.ref], text, "test").sums()[0]
        rows.setdefault(system, {})[text.name] = sums_D
    return rows


def _soups(
    ground: Ground, mixtures: Mixtures, forest: Members, with_seed: Members, driver: Driver
) -> list[tuple[System, PreparedText, AverageRequest]]:
    """Averages whose weights are searched on the averaged model's own loss: greedily over the experts, or learned, in which the
    seed has a part too."""
    called = {model.identity: name for name, model in with_seed.models}
    searches = []
    for text in ground.texts:
        start = posterior_weights(mixtures.prior(with_seed, text, PRIOR_ALONE))
        greedy = soup_request(ground, "greedy", forest.refs, text)
        learned = soup_request(ground, "learned", with_seed.refs, text, [start])
        searches.append((System("average", forest.seed_share, prior="greedy"), text, greedy))
        searches.append((System("average", forest.seed_share, prior="learned"), text, learned))
    found = driver.require(driver.workers.soup, [request for _, _, request in searches])
    return [
        (system, text, soup_average_request(ground, search.label, artifact, called))
        for (system, text, search), artifact in zip(searches, found, strict=True)
    ]


def _average_weights(mixtures: Mixtures, members: Members, text: PreparedText) -> dict[str, list[float]]:
    """The paper's three, and the posterior by the fitted prior beside the paper's ema."""
    ema_E, fitted_E = (mixtures.prior(members, text, way) for way in (THE_PAPERS, PRIOR_ALONE))
    return {
        "uniform": uniform_weights(len(ema_E)),
        "argmax": argmax_weights(ema_E),
        "ema": posterior_weights(ema_E),
        "fitted": posterior_weights(fitted_E),
    }
