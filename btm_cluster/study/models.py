"""All models of a repeat of a study: their trainings, in the order in which they follow each other, and the
ensembles that are made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import demix_request, transformer_lm_milestones
from btm_cluster.driver.text_requests import tokenize_requests
from btm_cluster.evaluation.systems import (
    DEMIX,
    FEW_METHODS,
    FOREST,
    GATE,
    GATE_FOR_ALL,
    MANY_METHODS,
    PRIOR_ALONE,
    Ensemble,
    System,
    with_seed,
)
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.requests import TrainRequest
from btm_cluster.study.branchings import experts_of, forest_of
from btm_cluster.study.comparison import Models
from btm_cluster.study.controls import (
    SEEDED_DEMIX,
    SEEDED_DEMIX_AT_EXPERTS_RATE,
    random_part,
    random_part_requests,
    scratch_request,
    seeded_demix_at_experts_rate_request,
    seeded_demix_request,
    transformer_lm_at_experts_rate_request,
)
from btm_cluster.study.early_stopping import best_milestones, stopped_forest
from btm_cluster.study.mixtures import routed_mixtures
from btm_cluster.study.repeat import Repeat, branches, fill_in, train, with_milestones

AT_EXPERTS_RATE = System("transformer-lm at the experts' rate")
BEST_AT_EXPERTS_RATE = System("transformer-lm at the experts' rate, at its best milestone")
PRIORS = ("uniform", "argmax", "ema", "fitted")
"""The averages of parameters that are measured: the paper's three, and the posterior by the fitted prior."""


@dataclass(frozen=True)
class _Trainings:
    """The trainings of a repeat."""

    whole: TrainRequest
    """The Transformer-LM, which all seeds lie on."""
    demix: list[TrainRequest]
    experts: Mapping[float, list[TrainRequest]]
    """Those of each forest, by seed share."""
    parts: list[PreparedText]
    """The texts of random splits."""
    dealt: list[TrainRequest]
    """Experts on these."""
    demix_from_seed: list[TrainRequest]
    at_experts_rate: list[TrainRequest]
    """Those that did not diverge."""
    others: list[Repeat]
    """Forests of other experts, of which none diverged."""


def train_repeat(repeat: Repeat, driver: Driver) -> tuple[Models, list[tuple[TrainRequest, Artifact]]]:
    """All models of a repeat, and the trainings with what came of each.

    Raises:
        StepError: a training failed. Those at the experts' rate and forests of other experts may diverge.
    """
    trainings, trained = _train(repeat, driver)
    forests, seeded = _forests(repeat, trainings)
    first = repeat.seed_shares[0]
    others = (
        [_members(repeat, "random-split", first, trainings.parts, trainings.dealt)] if trainings.dealt else []
    )
    others += _demixes(repeat, trainings.demix, trainings.demix_from_seed, trainings.at_experts_rate)
    controls, whole = _controls(repeat, trainings.at_experts_rate, driver)
    stopped_at: dict[str, int] = {}
    if repeat.stops_early:
        stopped, stopped_at = _stopped_experts(repeat.prepared, forests[0], trainings.experts[first], driver)
        others.append(stopped)
        whole |= dict.fromkeys((stopped.system, stopped.own_expert.system), forests[0].refs)
    milestones = transformer_lm_milestones(repeat.prepared, repeat.seeds[first].ref)
    otherwise = [(other.prepared, forest_of(other)) for other in trainings.others]
    mixtures = (
        routed_mixtures([(repeat.prepared, forests[0]), *otherwise])
        if _has(repeat, "mixture-of-experts")
        else {}
    )
    ensembles = (forests[0], seeded, *forests[1:], *others, *(forest for _, forest in otherwise))
    there = {other.experts for other in trainings.others}
    diverged = tuple(other.experts for other in repeat.others if other.experts not in there)
    models = Models(
        trainings.whole.ref, controls, milestones, ensembles, mixtures, stopped_at, whole, diverged
    )
    return models, trained


def _has(repeat: Repeat, system: str) -> bool:
    """Whether the study has such a system."""
    study = repeat.prepared.plan.study
    return study is not None and system in study.systems


def _train(repeat: Repeat, driver: Driver) -> tuple[_Trainings, list[tuple[TrainRequest, Artifact]]]:
    """Trains first the one run that all seeds lie on, then what branches from it."""
    prepared, seeds, first = repeat.prepared, repeat.seeds, repeat.seed_shares[0]
    whole, scratch = repeat.transformer_lm(), _scratch_requests(repeat)
    demix = [demix_request(prepared)] if _has(repeat, "demix") else []
    trained = train(repeat, [whole, *demix, *scratch], driver)
    fill_in(repeat, list(seeds.values()), driver)

    experts = {share: branches(repeat, prepared.domains, share) for share in seeds}
    parts = _random_parts(prepared, driver) if _has(repeat, "random-split") else []
    dealt = [replace(expert, snapshots=()) for expert in branches(repeat, parts, first)]
    demix_from_seed = [seeded_demix_request(prepared, seeds[first].ref)] if _has(repeat, SEEDED_DEMIX) else []
    branched = [*(expert for share in seeds for expert in experts[share]), *dealt, *demix_from_seed]
    at_experts_rate = _at_experts_rate(repeat)
    known = {request.ref for request in branched}
    of_others = [e for other in repeat.others for e in experts_of(other) if e.ref not in known]
    trained += train(repeat, branched, driver, may_diverge=[*at_experts_rate, *of_others])
    made = {request.ref for request, _ in trained}
    trainings = _Trainings(
        whole,
        demix,
        experts | ({0.0: scratch} if scratch else {}),
        parts,
        dealt,
        demix_from_seed,
        [request for request in at_experts_rate if request.ref in made],
        [other for other in repeat.others if made.issuperset(e.ref for e in experts_of(other))],
    )
    return trainings, trained


def _forests(repeat: Repeat, trainings: _Trainings) -> tuple[list[Ensemble], Ensemble]:
    """The forest of each seed share, and the first one with its seed as one model more."""
    domains, experts = repeat.prepared.domains, trainings.experts
    forests = [_members(repeat, FOREST, share, domains, experts[share]) for share in repeat.seed_shares]
    seeded = with_seed(forests[0], (*FEW_METHODS, PRIOR_ALONE, GATE_FOR_ALL, GATE))
    forests[0] = replace(forests[0], methods=MANY_METHODS, averages=(*PRIORS, "greedy"))
    return forests, replace(seeded, averages=("learned",))


def _scratch_requests(repeat: Repeat) -> list[TrainRequest]:
    """Experts without a seed, where the study has a seed share of 0."""
    if 0 not in repeat.seed_shares or 0 in repeat.seeds:
        return []
    return [scratch_request(repeat.prepared, domain, i) for i, domain in enumerate(repeat.prepared.domains)]


def _demixes(
    repeat: Repeat,
    demix: Sequence[TrainRequest],
    from_seed: Sequence[TrainRequest],
    at_experts_rate: Sequence[TrainRequest],
) -> list[Ensemble]:
    """The parts of each DEMix, mixed: of the one from the start, and of those that branch from the seed."""
    first = repeat.seed_shares[0]
    seeded = [(SEEDED_DEMIX, request) for request in from_seed]
    seeded += [(SEEDED_DEMIX_AT_EXPERTS_RATE, request) for request in at_experts_rate if request.is_demix]
    return [
        *(Ensemble(DEMIX, _named(repeat.prepared, request), FEW_METHODS) for request in demix),
        *(
            Ensemble(name, _named(repeat.prepared, request), FEW_METHODS, (), repeat.seeds[first].ref, first)
            for name, request in seeded
        ),
    ]


def _at_experts_rate(repeat: Repeat) -> list[TrainRequest]:
    """Transformer-LM and DEMix from the seed on at the experts' learning rate, where that is another."""
    prepared, seed = repeat.prepared, repeat.seeds[repeat.seed_shares[0]].ref
    branching, study = prepared.plan.branching, prepared.plan.study
    # LoRA's rate is none to train a whole model by.
    if branching.learning_rate_scale == 1 or branching.train == "lora":
        return []
    transformer_lm = [transformer_lm_at_experts_rate_request(prepared, seed)]
    if repeat.stops_early:
        transformer_lm = with_milestones(transformer_lm)
    has_demix = study is not None and SEEDED_DEMIX in study.systems
    return [*transformer_lm, *([seeded_demix_at_experts_rate_request(prepared, seed)] if has_demix else [])]


def _stopped_experts(
    prepared: PreparedPlan, forest: Ensemble, experts: Sequence[TrainRequest], driver: Driver
) -> tuple[Ensemble, dict[str, int]]:
    """The forest of experts at their best milestones, and their updates by domain."""
    own = [(expert, [domain]) for expert, domain in zip(experts, prepared.domains, strict=True)]
    names = [domain.name for domain in prepared.domains]
    best = dict(zip(names, best_milestones(prepared, own, driver), strict=True))
    return stopped_forest(forest, best), {name: one.update for name, one in best.items()}


def _controls(
    repeat: Repeat, at_rate: Sequence[TrainRequest], driver: Driver
) -> tuple[dict[System, Ref], dict[str, tuple[Ref, ...]]]:
    """The Transformer-LM at the experts' rate, where it was trained; and at its best milestone, where experts are
    stopped early and that is not its end. Then the finished model of the latter, by the system's name."""
    whole = next((request for request in at_rate if not request.is_demix), None)
    if whole is None:
        return {}, {}
    controls = {AT_EXPERTS_RATE: whole.ref}
    if repeat.stops_early:
        (best,) = best_milestones(repeat.prepared, [(whole, repeat.prepared.domains)], driver)
        if best.model != whole.ref:
            controls[BEST_AT_EXPERTS_RATE] = best.model
    return controls, {BEST_AT_EXPERTS_RATE.system: (whole.ref,)}


def _members(
    repeat: Repeat, system: str, share: float, texts: Sequence[PreparedText], requests: Sequence[TrainRequest]
) -> Ensemble:
    """An ensemble of a model for each text, with the seed that they branched from, if any."""
    models = tuple((text.name, request.ref) for text, request in zip(texts, requests, strict=True))
    seed = repeat.seeds[share].ref if share in repeat.seeds else None
    return Ensemble(system, models, (*FEW_METHODS, PRIOR_ALONE), PRIORS, seed, share)


def _named(prepared: PreparedPlan, demix: TrainRequest) -> tuple[tuple[str, Ref], ...]:
    """A DEMix's parts by domain."""
    names = {text: domain for domain, text in prepared.founders}
    return tuple((names[part.text], part.ref) for part in demix.parts)


def _random_parts(prepared: PreparedPlan, driver: Driver) -> list[PreparedText]:
    requests = random_part_requests(prepared)
    read_results = driver.require(requests)
    parts = [
        random_part(prepared, r, read_result, driver.ledger)
        for r, read_result in zip(requests, read_results, strict=True)
    ]
    shards = [
        shard
        for part in parts
        for shard in tokenize_requests(
            part.name, part.identity, part.facts, prepared.tokenizer, prepared.plan
        )["train"]
    ]
    driver.require(shards)
    return parts
