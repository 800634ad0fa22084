"""The verb *mix*: several models' scores of a text to those of their mixture, in any number of ways.

Pure arithmetic on stored scores, for one text and group of models at a time. What is fitted is fitted on the text's development
blocks, or, one setting for all, on the domains' development blocks alone, which is what a text without any of its own gets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch

from btm_cluster.equations.gates import fit_discounts, fit_fixed_share
from btm_cluster.equations.learned_gate import LearnedGate, TextScores, fit_gate_for_all, tune_gate
from btm_cluster.equations.posterior import PriorKind, keep_top
from btm_cluster.fits import FIT, Fitted, open_gate, read_fit, write_fit
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing import Mixing, PosteriorName, fit_mixing, one_thread_each, shared_mixing
from btm_cluster.plan import MergingPlan
from btm_cluster.requests import FitForAll, MixRequest, MixText, ScoredSplit, TuneGate, Way
from btm_cluster.scores import ScoreStack
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers import Control, Progress

ForAll: TypeAlias = Mapping[str, Fitted]
"""By posterior: what is one setting for all."""
SUMS, PRIORS = "sums.npy", "priors.npy"
GATE = "gate"


def mix(request: MixRequest, ledger: Ledger, control: Control) -> Artifact:
    """Fits for all texts, tunes a gate to one, or fits and mixes one.

    A mixture's files: `sums.npy`, float64 [ways, D], and `priors.npy`, float64 [ways, E], where a gate has NaN.
    """
    with one_thread_each(), scratch_folder() as scratch:
        if isinstance(request, FitForAll):
            control.report(Progress(request.label, "fitting for all texts"))
            files = _fit_for_all(request, ledger, scratch)
        elif isinstance(request, TuneGate):
            control.report(Progress(request.label, "tuning"))
            files = _tune_gate(request, ledger, scratch)
        else:
            control.report(Progress(request.label, "mixing"))
            files = _mix_text(request, ledger, scratch)
        return ledger.commit(request.ref, request.recipe, files, {})


def _mix_text(request: MixText, ledger: Ledger, scratch: Path) -> dict[str, Path]:
    sample = _stack(ledger, request.development).sample(request.merging.development_blocks)
    test = _stack(ledger, request.test)
    for_all = {
        posterior: read_fit(posterior, ledger.open_file(ledger.get(ref), FIT), sample, request.merging)
        for posterior, ref in request.for_all
    }
    fitted = fit_ways(request.ways, sample, request.merging, for_all)
    np.save(scratch / SUMS, torch.stack([_sums(test, fitted[way]) for way in request.ways]).numpy())
    unknown_E = torch.full((len(sample.logp_EBT),), torch.nan, dtype=torch.float64)
    priors = [one.log_prior_E if isinstance(one, Mixing) else unknown_E for one in map(fitted.get, request.ways)]
    np.save(scratch / PRIORS, torch.stack(priors).numpy())
    return {name: scratch / name for name in (SUMS, PRIORS)}


def _fit_for_all(request: FitForAll, ledger: Ledger, scratch: Path) -> dict[str, Path]:
    blocks = request.merging.development_blocks
    samples = [_stack(ledger, domain).sample(blocks) for domain in request.domains]
    write_fit(fit_for_all(request.posterior, samples, request.merging), scratch / FIT)
    return {FIT: scratch / FIT}


def _tune_gate(request: TuneGate, ledger: Ledger, scratch: Path) -> dict[str, Path]:
    sample = _stack(ledger, request.development).sample(request.merging.development_blocks)
    for_all = open_gate(ledger, ledger.get(request.for_all))
    write_fit(tune_gate(sample, for_all), scratch / FIT)
    return {FIT: scratch / FIT}


def fit_for_all(posterior: str, samples: Sequence[TextScores], merging: MergingPlan) -> Fitted:
    """One setting for all texts, from several texts' development blocks."""
    if posterior == GATE:
        return fit_gate_for_all(samples)
    pairs = [(sample.logp_EBT, sample.mask_BT) for sample in samples]
    if posterior == "calibrated":
        return shared_mixing(pairs, merging)
    assert posterior == "discounts", posterior
    logp_EBT = torch.cat([logp_EBT for logp_EBT, _ in pairs], dim=1)
    return fit_discounts(logp_EBT, torch.cat([mask_BT for _, mask_BT in pairs]), fits_prior=False)


def fit_ways(ways: Sequence[Way], sample: TextScores, merging: MergingPlan, for_all: ForAll) -> dict[Way, Fitted]:
    """Each way, fitted on a text's development blocks in hash order; ways that differ in their top k share a fit."""
    own = dict.fromkeys(replace(way, top_k=None) for way in ways if not way.is_for_all)
    fitted = {way: _fit(way, sample, merging, for_all) for way in own}

    def of(way: Way) -> Fitted:
        if way.is_for_all:
            assert way.development_blocks is way.top_k is None, "one setting for all has no number of a text's own"
            return for_all[way.posterior]
        one = fitted[replace(way, top_k=None)]
        return replace(one, log_prior_E=keep_top(one.log_prior_E, way.top_k)) if isinstance(one, Mixing) else one

    return {way: of(way) for way in ways}


def _fit(way: Way, sample: TextScores, merging: MergingPlan, for_all: ForAll) -> Fitted:
    blocks = way.development_blocks or merging.development_blocks
    logp_EBT, mask_BT = sample.logp_EBT[:, :blocks], sample.mask_BT[:blocks]
    if way.posterior == "fixed-share":
        return fit_fixed_share(logp_EBT, mask_BT)
    if way.posterior == "discounts":
        return fit_discounts(logp_EBT, mask_BT)
    if way.posterior == GATE:
        return tune_gate(
            TextScores(logp_EBT, sample.entropy_EBT[:, :blocks], mask_BT), cast(LearnedGate, for_all[GATE])
        )
    return fit_mixing(cast(PosteriorName, way.posterior), cast(PriorKind, way.prior), logp_EBT, mask_BT, merging)


def _sums(test: ScoreStack, fitted: Fitted) -> torch.Tensor:
    if isinstance(fitted, Mixing):
        return test.mixture_sums(fitted.log_prior_E, fitted.posterior)
    return test.gated_sums(fitted)


def _stack(ledger: Ledger, split: ScoredSplit) -> ScoreStack:
    found = ledger.find_all(split.scores)
    return ScoreStack(
        ledger, [one or ledger.get(ref) for one, ref in zip(found, split.scores, strict=True)], split.tokens
    )
