"""Scores once, then arithmetic: every model's token log-probabilities, and what ensembles and averages make of them.

Asks the workers for scores and averages. Everything fitted is fitted on development text; `report.py` makes the tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from btm_cluster.cluster_ensemble import with_cluster_ensemble
from btm_cluster.driver import Driver
from btm_cluster.equations.averaging import posterior_weights, uniform_weights
from btm_cluster.equations.learned_gate import LearnedGate
from btm_cluster.equations.posterior import keep_top, log_prior
from btm_cluster.fits import open_gate
from btm_cluster.forest import Forest
from btm_cluster.ground import HELD_OUT, Ground, PreparedText
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing import FULL, Mixing, TargetFit, default_fit, fit_target, fits_at_once
from btm_cluster.recipes import average_request, score_request
from btm_cluster.report import (
    CALIBRATED_DEMIX,
    CALIBRATED_ENSEMBLE,
    GATED_ENSEMBLE,
    PAPER_DEMIX,
    PAPER_ENSEMBLE,
    SEED,
    SEEDED_ENSEMBLE,
    SEEDED_GATE,
    TRANSFORMER_LM,
    SplitResult,
)
from btm_cluster.requests import FitForAll, ScoredSplit, TuneGate
from btm_cluster.scores import ScoreStack

ModelScores = Mapping[tuple[str, str, str], Artifact]
"""Scores by model identity, text name and split."""
Stacks = Mapping[tuple[str, str], ScoreStack]
"""Scores of the same models in the same order, by text name and split."""


@dataclass(frozen=True)
class Evaluation:
    """Every system's result on every text, what was fitted for each, and the averaged models by label."""

    results: tuple[SplitResult, ...]
    fits: Mapping[str, TargetFit]
    averages: Mapping[str, Ref]


def evaluate(
    ground: Ground, forest: Forest, baseline: Ref | None, driver: Driver, demix: Sequence[Ref] = ()
) -> Evaluation:
    """Scores seed, experts, baseline and averages on every held-out text, and combines them."""
    ledger = driver.ledger
    experts = [Ref("model", expert.identity) for expert in forest.experts]
    single = [Ref("model", forest.foundation.seed), *experts, *([baseline] if baseline else [])]
    scores = score_models(ground, [(model, text) for model in single for text in ground.texts], driver)
    stacks = _stacks(ground, experts, scores, ledger)
    fits = fit_targets(ground, stacks)
    averages = average_models(ground, forest, fits, driver)
    scored_on = [(averages["uniform"], text) for text in ground.texts]
    scored_on += [(averages[f"posterior for {text.name}"], text) for text in ground.texts]
    scores = scores | score_models(ground, scored_on, driver)
    results = tuple(
        _split_result(ledger, forest, text, split, stacks, fits[text.name], scores, averages, baseline)
        for split in HELD_OUT
        for text in ground.texts
        if text.tokens[split]
    )
    results = _with_planned(ground, forest, results, stacks, fits, scores, driver)
    if demix:
        results = _with_demix(ground, results, demix, driver)
    results = with_cluster_ensemble(results, ground, forest, stacks, ledger)
    return Evaluation(results, fits, averages)


def mixed_models(ground: Ground, forest: Forest) -> dict[str, Ref]:
    """What the plan's posterior or gate mixes, by what it is called: the experts, and the seed where the plan says so."""
    models = {expert.domain: Ref("model", expert.identity) for expert in forest.experts}
    return models | ({"the seed": Ref("model", forest.foundation.seed)} if ground.plan.merging.with_seed else {})


def _stacks(ground: Ground, models: Sequence[Ref], scores: ModelScores, ledger: Ledger) -> Stacks:
    return {
        (text.name, split): stack_of(ledger, scores, models, text, split)
        for text in ground.texts
        for split in HELD_OUT
        if text.tokens[split]
    }


def _with_planned(
    ground: Ground,
    forest: Forest,
    results: Sequence[SplitResult],
    stacks: Stacks,
    fits: Mapping[str, TargetFit],
    scores: ModelScores,
    driver: Driver,
) -> tuple[SplitResult, ...]:
    """The ensemble that the plan asks for beside those that are always there. Stacks and fits are the experts'."""
    merging, models = ground.plan.merging, list(mixed_models(ground, forest).values())
    if merging.with_seed:
        stacks = _stacks(ground, models, scores, driver.ledger)
        fits = fit_targets(ground, stacks)
    gates = fit_gates(ground, models, ground.texts, scores, driver) if merging.posterior == "gate" else {}
    is_calibrated = all(_same(fit.planned, fit.calibrated) for fit in fits.values())
    planned, gated = "ensemble, as planned", GATED_ENSEMBLE
    if merging.with_seed:
        planned, gated = SEEDED_ENSEMBLE if is_calibrated else "ensemble with the seed, as planned", SEEDED_GATE

    def logp(result: SplitResult) -> dict[str, torch.Tensor]:
        stack, mixing = stacks[result.text, result.split], fits[result.text].planned
        sums = {}
        if merging.with_seed or not is_calibrated:
            sums[planned] = stack.mixture_sums(mixing.log_prior_E, mixing.posterior)
        if gates:
            sums[gated] = stack.gated_sums(gates[result.text])
        return sums

    return tuple(replace(result, logp={**result.logp, **logp(result)}) for result in results)


def _with_demix(
    ground: Ground, results: Sequence[SplitResult], demix: Sequence[Ref], driver: Driver
) -> tuple[SplitResult, ...]:
    """DEMix beside the other systems: the ensemble of its parts, mixed and fitted as the forest's experts are."""
    scores = score_models(ground, [(part, text) for part in demix for text in ground.texts], driver)
    texts = {text.name: text for text in ground.texts}
    stacks = {(r.text, r.split): stack_of(driver.ledger, scores, demix, texts[r.text], r.split) for r in results}
    fits = fit_targets(ground, stacks)

    def logp(result: SplitResult) -> dict[str, torch.Tensor]:
        fit, stack = fits[result.text], stacks[result.text, result.split]
        mixings = {PAPER_DEMIX: fit.paper, CALIBRATED_DEMIX: fit.calibrated}
        return {name: stack.mixture_sums(m.log_prior_E, m.posterior) for name, m in mixings.items()}

    return tuple(replace(result, logp={**result.logp, **logp(result)}) for result in results)


def score_models(
    ground: Ground, pairs: Sequence[tuple[Ref, PreparedText]], driver: Driver, splits: Sequence[str] = HELD_OUT
) -> dict[tuple[str, str, str], Artifact]:
    """Scores of each (model, text) pair on the splits, made or reused."""
    keys = [(model, text, split) for model, text in pairs for split in splits if text.tokens[split]]
    requests = [score_request(ground, model, text, split) for model, text, split in keys]
    scored = driver.require(driver.workers.score, requests)
    return {(m.identity, text.name, split): s for (m, text, split), s in zip(keys, scored, strict=True)}


def average_models(ground: Ground, forest: Forest, fits: Mapping[str, TargetFit], driver: Driver) -> dict[str, Ref]:
    """The uniform average, and a posterior-weighted one for each text. (An argmax average is an expert.)"""
    weights = {"uniform": uniform_weights(len(forest.experts))}
    weights |= {f"posterior for {name}": fit.average_weights for name, fit in fits.items()}
    requests = [average_request(ground, label, forest, w) for label, w in weights.items()]
    driver.require(driver.workers.average, requests)
    return {label: request.ref for label, request in zip(weights, requests, strict=True)}


def fit_targets(ground: Ground, stacks: Stacks) -> dict[str, TargetFit]:
    """Fits each text's mixing on its development blocks; texts without any get the calibrated default of the others."""
    merging = ground.plan.merging
    found = {name: stack for (name, split), stack in stacks.items() if split == "development"}

    def sample(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return found[name].take(0, merging.development_blocks)

    fits = dict(zip(found, fits_at_once(lambda name: fit_target(*sample(name), merging), list(found)), strict=True))
    missing = [text for text in ground.texts if text.name not in fits]
    if missing:
        default = default_fit([sample(text.name) for text in ground.domains if text.name in found], merging)
        fits |= {text.name: default for text in missing}
    return fits


def fit_text(ground: Ground, models: Sequence[Ref], text: PreparedText | None, driver: Driver) -> TargetFit:
    """Fits one text alone, scoring what it takes: its development text; the domains' where it has none, or none is given."""
    has_its_own = text is not None and bool(text.tokens["development"])
    needed = [text] if text is not None and has_its_own else list(ground.domains)
    pairs = [(model, one) for one in needed for model in models]
    scores = score_models(ground, pairs, driver, splits=["development"])
    samples = [
        stack_of(driver.ledger, scores, models, one, "development").take(0, ground.plan.merging.development_blocks)
        for one in needed
    ]
    if has_its_own:
        return fit_target(*samples[0], ground.plan.merging)
    return default_fit(samples, ground.plan.merging)


def fit_gates(
    ground: Ground, models: Sequence[Ref], texts: Sequence[PreparedText], scores: ModelScores, driver: Driver
) -> dict[str | None, LearnedGate]:
    """A gate for each text, by name: tuned to its development text; that for all texts where it has none, and at None.

    `scores` has the models' on the development text of the domains and of these texts.
    """
    merging = ground.plan.merging
    tuned = [text for text in texts if text.tokens["development"]]

    def scored(text: PreparedText) -> ScoredSplit:
        refs = tuple(scores[model.identity, text.name, "development"].ref for model in models)
        return ScoredSplit(refs, text.tokens["development"])

    for_all = FitForAll("gate for all texts", "gate", tuple(map(scored, ground.domains)), merging)
    (shared,) = driver.require(driver.workers.mix, [for_all])
    requests = [TuneGate(f"gate for {text.name}", scored(text), for_all.ref, merging) for text in tuned]
    own = driver.require(driver.workers.mix, requests)
    gates: dict[str | None, LearnedGate] = dict.fromkeys(
        [None, *(text.name for text in texts)], open_gate(driver.ledger, shared)
    )
    return gates | {text.name: open_gate(driver.ledger, fit) for text, fit in zip(tuned, own, strict=True)}


def average_weights(ground: Ground, forest: Forest, texts: Sequence[PreparedText], driver: Driver) -> list[list[float]]:
    """The experts' weights in the posterior-weighted average for each text, by its development text.

    All is scored at once, so that each expert is loaded once, however many texts there are.
    """
    experts, merging = [Ref("model", expert.identity) for expert in forest.experts], ground.plan.merging
    pairs = [(model, text) for model in experts for text in texts]
    scores = score_models(ground, pairs, driver, splits=["development"])
    stacks = [stack_of(driver.ledger, scores, experts, text, "development") for text in texts]
    samples = [stack.take(0, merging.development_blocks) for stack in stacks]
    return [posterior_weights(log_prior(merging.average_prior, *sample, FULL).exp()) for sample in samples]


def stack_of(ledger: Ledger, scores: ModelScores, models: Sequence[Ref], text: PreparedText, split: str) -> ScoreStack:
    """Several models' scores on one split of one text."""
    return ScoreStack(ledger, [scores[m.identity, text.name, split] for m in models], text.tokens[split])


def _split_result(
    ledger: Ledger,
    forest: Forest,
    text: PreparedText,
    split: str,
    stacks: Stacks,
    fit: TargetFit,
    scores: ModelScores,
    averages: Mapping[str, Ref],
    baseline: Ref | None,
) -> SplitResult:
    """Every system's sums by document on one split."""

    def single(model: Ref) -> torch.Tensor:
        return stack_of(ledger, scores, [model], text, split).sums()[0]

    stack = stacks[text.name, split]
    experts_ED = stack.sums()
    logp = {SEED: single(Ref("model", forest.foundation.seed))}
    if baseline is not None:
        logp[TRANSFORMER_LM] = single(baseline)
    logp["best single expert"] = experts_ED[_best_expert(stacks, text, fit)]
    if text.name in forest.domains:
        logp["the domain's own expert"] = experts_ED[forest.domains.index(text.name)]
    logp["average, uniform"] = single(averages["uniform"])
    logp["average, argmax"] = experts_ED[fit.argmax_weights.index(1.0)]
    logp["average, posterior"] = single(averages[f"posterior for {text.name}"])
    logp |= _ensembles(stack, fit)
    return SplitResult(text.name, text.is_target, split, logp, stack.tokens())


def _ensembles(stack: ScoreStack, fit: TargetFit) -> dict[str, torch.Tensor]:
    half = max(1, len(fit.calibrated.log_prior_E) // 2)
    top = Mixing(keep_top(fit.calibrated.log_prior_E, half), fit.calibrated.posterior)
    mixings = {PAPER_ENSEMBLE: fit.paper, CALIBRATED_ENSEMBLE: fit.calibrated, f"ensemble, top-{half}": top}
    return {name: stack.mixture_sums(m.log_prior_E, m.posterior) for name, m in mixings.items()}


def _same(one: Mixing, other: Mixing) -> bool:
    return one.posterior == other.posterior and torch.equal(one.log_prior_E, other.log_prior_E)


def _best_expert(stacks: Stacks, text: PreparedText, fit: TargetFit) -> int:
    """The expert with the lowest development perplexity; without development text, the one the prior favours."""
    development = stacks.get((text.name, "development"))
    if development is None:
        return int(fit.planned.log_prior_E.argmax())
    return int(development.sums().sum(1).argmax())
