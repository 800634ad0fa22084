"""The evaluation of a forest as its plan asks for it: which rows there
are, and the names they are shown by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from btm_cluster.curve import Rise
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.recipes import transformer_lm_milestones
from btm_cluster.evaluation import rows
from btm_cluster.evaluation.cluster_ensemble import with_cluster_ensemble
from btm_cluster.evaluation.comparison import Comparer, Comparison, fits_of
from btm_cluster.evaluation.mixture_of_experts import mixture_of_experts_requests
from btm_cluster.evaluation.systems import (
    BEST_TRANSFORMER_LM,
    CALIBRATED,
    DEMIX,
    FOREST,
    GATE,
    PAPERS,
    SEEDED_FOREST,
    TRANSFORMER_LM,
    Ensemble,
    System,
    judged_method,
    planned_method,
    with_seed,
)
from btm_cluster.evaluation.verdict import SplitResult
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ref
from btm_cluster.ledger.curves import read_rise
from btm_cluster.mixing.fit_file import Fitted, open_fits
from btm_cluster.plan import MixtureOfExpertsPlan
from btm_cluster.requests import MixingMethod

SEED = System("seed")


@dataclass(frozen=True)
class Evaluation:
    """Every system's result on every text, and what was fitted for each."""

    results: tuple[SplitResult, ...]
    fits: Mapping[str, Mapping[MixingMethod, Fitted]]
    """Fits of the experts alone, by text and method."""
    milestones: rows.Milestones | None
    """The Transformer-LM's."""
    costs: Mapping[str, float]
    """Forward passes of a model for a token, by parameters, by system."""
    rise: Rise | None
    """The Transformer-LM's, if its training loss ended higher than it had been."""


def evaluate(
    prepared: PreparedPlan, forest: Forest, baseline: Ref | None, driver: Driver, demix: Sequence[Ref] = ()
) -> Evaluation:
    """Scores seed, experts, baseline and averages on every held-out text, and combines them."""
    comparer = comparer_of(prepared, forest, baseline, demix)
    comparison, experts = comparer.compare(driver), comparer.ensembles[0]
    results = with_cluster_ensemble(
        _results(prepared, comparison, comparer.ensembles), prepared, forest, driver.ledger
    )
    fits = {
        text: open_fits(driver.ledger, driver.ledger.get(ref))
        for text, ref in fits_of(prepared, experts).items()
    }
    shown = _names(prepared, comparer.ensembles)
    costs = {shown[system]: cost for system, cost in comparison.costs.items() if system in shown}
    costs |= {rows.CLUSTER_ENSEMBLE: len(forest.experts)}
    return Evaluation(results, fits, comparison.milestones, costs, read_rise(driver.ledger, baseline))


def comparer_of(
    prepared: PreparedPlan, forest: Forest, baseline: Ref | None, demix: Sequence[Ref]
) -> Comparer:
    """Everything that the plan compares."""
    seed = Ref("model", forest.foundation.seed)
    single = {SEED: seed} | ({TRANSFORMER_LM: baseline} if baseline else {})
    milestones = transformer_lm_milestones(prepared, seed) if baseline else {}
    ensembles = [forest_ensemble(prepared, forest)]
    if prepared.plan.merging.with_seed:
        ensembles.append(planned_ensemble(prepared, forest))
    if demix:
        parts = tuple(
            (domain, part) for (domain, _), part in zip(prepared.founders_by_text, demix, strict=True)
        )
        ensembles.append(Ensemble(DEMIX, parts, (PAPERS, CALIBRATED)))
    wanted = prepared.plan.merging.mixture_of_experts
    mixtures = (
        {}
        if wanted is None
        else {_routed(ensembles[0], wanted): mixture_of_experts_requests(prepared, ensembles[0], wanted)}
    )
    return Comparer(prepared, single, ensembles, milestones=milestones, mixtures=mixtures)


def _routed(experts: Ensemble, wanted: MixtureOfExpertsPlan) -> System:
    return experts.routed_to(min(wanted.experts_per_token, len(experts.models)))


def forest_ensemble(prepared: PreparedPlan, forest: Forest) -> Ensemble:
    """The forest's experts, with every mixing method and average that a run shows."""
    merging, experts = prepared.plan.merging, len(forest.experts)
    half = max(1, experts // 2)
    methods = [PAPERS, CALIBRATED, replace(CALIBRATED, top_k=half), judged_method(merging, experts)]
    methods += [GATE] if merging.posterior == "gate" and not merging.with_seed else []
    return Ensemble(
        FOREST,
        tuple((expert.domain, Ref("model", expert.identity)) for expert in forest.experts),
        tuple(dict.fromkeys(methods)),
        tuple(dict.fromkeys(("uniform", "argmax", merging.average_prior))),
        Ref("model", forest.foundation.seed),
    )


def planned_ensemble(prepared: PreparedPlan, forest: Forest) -> Ensemble:
    """The ensemble that the plan asks for: the experts, and the seed where the plan says so."""
    experts = forest_ensemble(prepared, forest)
    if not prepared.plan.merging.with_seed:
        return experts
    merging, models = prepared.plan.merging, len(experts.models) + 1
    methods = dict.fromkeys([judged_method(merging, models), planned_method(merging, models)])
    return with_seed(experts, tuple(methods))


def _names(prepared: PreparedPlan, ensembles: Sequence[Ensemble]) -> dict[System, str]:
    """The rows of a run's tables in order, by the names that they are shown by."""
    experts, *others = ensembles
    half = max(1, len(experts.models) // 2)
    prior = prepared.plan.merging.average_prior
    wanted = prepared.plan.merging.mixture_of_experts
    routed = _routed(experts, wanted) if wanted else None
    names = {
        SEED: rows.SEED,
        TRANSFORMER_LM: rows.TRANSFORMER_LM,
        BEST_TRANSFORMER_LM: rows.BEST_MILESTONE,
        System("best single expert"): rows.BEST_EXPERT,
        System("own expert"): rows.OWN_EXPERT,
        experts.averaged_by("uniform"): rows.UNIFORM_AVERAGE,
        experts.averaged_by("argmax"): rows.ARGMAX_AVERAGE,
        **({} if prior == "uniform" else {experts.averaged_by(prior): rows.POSTERIOR_AVERAGE}),
        **({routed: rows.mixture_of_experts(routed.top_k or 0)} if routed else {}),
        experts.mixed_by(PAPERS): rows.PAPER_ENSEMBLE,
        experts.mixed_by(CALIBRATED): rows.CALIBRATED_ENSEMBLE,
        experts.mixed_by(replace(CALIBRATED, top_k=half)): rows.top_k_ensemble(half),
    }
    for ensemble in others:
        names |= {ensemble.mixed_by(method): _name(ensemble, method) for method in ensemble.methods}
    names |= {
        experts.mixed_by(method): _name(experts, method)
        for method in experts.methods
        if experts.mixed_by(method) not in names
    }
    return names


def _name(ensemble: Ensemble, method: MixingMethod) -> str:
    if ensemble.system == DEMIX:
        return {PAPERS: rows.PAPER_DEMIX, CALIBRATED: rows.CALIBRATED_DEMIX}[method]
    if ensemble.system == SEEDED_FOREST:
        return {CALIBRATED: rows.SEEDED_ENSEMBLE, GATE: rows.SEEDED_GATE}.get(
            method, rows.PLANNED_SEEDED_ENSEMBLE
        )
    return {GATE: rows.GATED_ENSEMBLE}.get(method, rows.PLANNED_ENSEMBLE)


def _results(
    prepared: PreparedPlan, comparison: Comparison, ensembles: Sequence[Ensemble]
) -> tuple[SplitResult, ...]:
    names = _names(prepared, ensembles)
    targets = {text.name: text.is_target for text in prepared.texts}
    return tuple(
        SplitResult(
            name,
            targets[name],
            split,
            {
                shown: comparison.rows[system][name, split]
                for system, shown in names.items()
                if (name, split) in comparison.rows.get(system, {})
            },
            sizes_UD,
        )
        for (name, split), sizes_UD in comparison.sizes.items()
    )
