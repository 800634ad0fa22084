"""Fits how models are mixed: one setting for all texts, or several methods for one text.

Pure arithmetic on stored scores.

A text's fits see its development blocks in hash order. One setting for all sees the domains' development
blocks alone, which is what a text without development text gets.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from btm_cluster.equations.averaging import argmax_weights, posterior_weights
from btm_cluster.equations.gates import fit_discounts, fit_fixed_share
from btm_cluster.equations.learned_gate import LearnedGate, TextScores, fit_gate_for_all, tune_gate
from btm_cluster.equations.posterior import PriorKind, keep_top, uniform_prior
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing.fit_file import FIT_FILE, Fitted, open_fits, write_fits
from btm_cluster.mixing.fitting import FULL, Mixing, PosteriorName, fit_mixing, one_thread_each, shared_mixing
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.plan import MergingPlan
from btm_cluster.requests import FitForAll, FitText, MixingMethod, ScoredSplit
from btm_cluster.requests.progress import Control, Counter, Progress
from btm_cluster.storage.scratch import scratch_folder

GATE = "gate"


def fit_for_all(request: FitForAll, ledger: Ledger, control: Control) -> Artifact:
    """Fits one setting for all texts. The artifact has one fit, whose prior is uniform."""
    control.report(Progress(request.label, "fitting"))
    with one_thread_each():
        samples = [sample_of(ledger, domain, request.merging) for domain in request.domains]
        return _commit(request, [fit_together(request.posterior, samples, request.merging)], {}, ledger)


def fit_text(request: FitText, ledger: Ledger, control: Control) -> Artifact:
    """Fits every method for one text.

    Facts hold `weights` of averages by model identity, under the names that fit.

    Named are the priors that methods without a posterior have, and `argmax`: the one model with the largest
    prior of the paper.
    """
    with one_thread_each():
        for_all = {
            method: fit
            for ref in request.for_all
            for method, fit in open_fits(ledger, ledger.get(ref)).items()
        }
        counter = Counter(control, request.label, "fitting", unit="methods")
        if request.development.scores:
            sample = sample_of(ledger, request.development, request.merging)
            fits = fit_methods(request.methods, sample, request.merging, for_all, counter.over)
        else:
            fits = _without_text(request.methods, len(request.models), request.merging, for_all)
        identities = [model.identity for model in request.models]
        facts = {
            "weights": {
                name: dict(zip(identities, w, strict=True)) for name, w in average_weights(fits).items()
            }
        }
        return _commit(request, list(fits.values()), facts, ledger)


def sample_of(ledger: Ledger, split: ScoredSplit, merging: MergingPlan) -> TextScores:
    """The blocks that fits look at."""
    return ScoreStack.of(ledger, split).sample(merging.development_blocks)


def fit_together(posterior: str, samples: Sequence[TextScores], merging: MergingPlan) -> Fitted:
    """One setting for all texts, from several texts' development blocks."""
    if posterior == GATE:
        return fit_gate_for_all(samples)
    pairs = [(sample.logp_EBT, sample.mask_BT) for sample in samples]
    if posterior == "calibrated":
        return shared_mixing(pairs, merging)
    assert posterior == "discounts", posterior
    logp_EBT = torch.cat([logp_EBT for logp_EBT, _ in pairs], dim=1)
    return fit_discounts(logp_EBT, torch.cat([mask_BT for _, mask_BT in pairs]), fits_prior=False)


def fit_methods(
    methods: Sequence[MixingMethod],
    sample: TextScores,
    merging: MergingPlan,
    for_all: Mapping[MixingMethod, Fitted],
    over: Callable[[Iterable[MixingMethod]], Iterable[MixingMethod]] = iter,
) -> dict[MixingMethod, Fitted]:
    """Each method, fitted on a text's development blocks in hash order; methods
    that differ in their top k share a fit. `over` goes over those that are fitted."""
    own = dict.fromkeys(replace(method, top_k=None) for method in methods if not method.is_for_all)
    fitted = {method: _fit(method, sample, merging, for_all) for method in over(own)}

    def fit_of(method: MixingMethod) -> Fitted:
        if method.is_for_all:
            return for_all[for_all_of(method.posterior)]
        return _keep_top(fitted[replace(method, top_k=None)], method.top_k)

    return {method: fit_of(method) for method in methods}


def for_all_of(posterior: str) -> MixingMethod:
    """The method that is one setting for all texts."""
    return MixingMethod(posterior, "uniform", is_for_all=True)


def average_weights(fits: Mapping[MixingMethod, Fitted]) -> dict[str, list[float]]:
    """Weights of averages by name: those of every prior that a method has
    by itself, and the paper's argmax."""
    priors = {
        method.prior: fit.log_prior_E.exp()
        for method, fit in fits.items()
        if isinstance(fit, Mixing) and method.posterior == "none"
    }
    weights = {name: posterior_weights(prior_E) for name, prior_E in priors.items()}
    return weights | ({"argmax": argmax_weights(priors["ema"])} if "ema" in priors else {})


def _fit(
    method: MixingMethod, sample: TextScores, merging: MergingPlan, for_all: Mapping[MixingMethod, Fitted]
) -> Fitted:
    blocks = method.development_blocks or merging.development_blocks
    logp_EBT, mask_BT = sample.logp_EBT[:, :blocks], sample.mask_BT[:blocks]
    if method.posterior == "fixed-share":
        return fit_fixed_share(logp_EBT, mask_BT)
    if method.posterior == "discounts":
        return fit_discounts(logp_EBT, mask_BT)
    if method.posterior == GATE:
        start = cast(LearnedGate, for_all[for_all_of(GATE)])
        return tune_gate(TextScores(logp_EBT, sample.entropy_EBT[:, :blocks], mask_BT), start)
    return fit_mixing(
        cast(PosteriorName, method.posterior), cast(PriorKind, method.prior), logp_EBT, mask_BT, merging
    )


def _without_text(
    methods: Sequence[MixingMethod], models: int, merging: MergingPlan, for_all: Mapping[MixingMethod, Fitted]
) -> dict[MixingMethod, Fitted]:
    """Each method for a text of which nothing is known: one setting for all
    where there is one, and a uniform prior."""
    nothing_EBT = torch.zeros(models, 0, 1, dtype=torch.float64)
    mask_BT = torch.zeros(0, 1, dtype=torch.bool)

    def fit(method: MixingMethod) -> Fitted:
        shared = for_all.get(for_all_of(method.posterior))
        if shared is not None:
            return _keep_top(shared, method.top_k)
        if method.posterior == "none":
            return Mixing(uniform_prior(nothing_EBT), replace(FULL, weight=0.0))
        name = cast(PosteriorName, method.posterior)
        return _keep_top(fit_mixing(name, "uniform", nothing_EBT, mask_BT, merging), method.top_k)

    return {method: fit(method) for method in methods}


def _keep_top(fit: Fitted, k: int | None) -> Fitted:
    return replace(fit, log_prior_E=keep_top(fit.log_prior_E, k)) if isinstance(fit, Mixing) else fit


def _commit(
    request: FitForAll | FitText, fits: Sequence[Fitted], facts: Mapping[str, object], ledger: Ledger
) -> Artifact:
    with scratch_folder() as scratch:
        write_fits(fits, scratch / FIT_FILE)
        return ledger.commit(request, {FIT_FILE: scratch / FIT_FILE}, facts)
