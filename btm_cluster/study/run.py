"""A study: the paper's comparison on the plan's texts, for every size and random seed it names.

Trains all systems of one size and random seed, a repeat, from one seed run, and hands what came of it to
`comparison.py`. Everything is an artifact: what is there already is not made again, and a study that was
killed goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import demix_request, transformer_lm_milestones
from btm_cluster.driver.text_requests import tokenize_requests
from btm_cluster.evaluation.comparison import Comparison
from btm_cluster.evaluation.costs import costs_of
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
from btm_cluster.evaluation.texts import TextReport, report_texts
from btm_cluster.language_model.demix import count_demix_parameters
from btm_cluster.language_model.model import count_parameters
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.study.adaptation import adapt
from btm_cluster.study.branchings import experts_of, forest_of
from btm_cluster.study.comparison import Models, compare, entries_from
from btm_cluster.study.controls import (
    DEMIXES,
    SEEDED_DEMIX,
    SEEDED_DEMIX_AT_EXPERTS_RATE,
    random_part,
    random_part_requests,
    scratch_request,
    seeded_demix_at_experts_rate_request,
    seeded_demix_request,
    transformer_lm_at_experts_rate_request,
)
from btm_cluster.study.early_stopping import STOPPED_FOREST, best_milestones, stopped_forest
from btm_cluster.study.growth import measure_growth
from btm_cluster.study.mixtures import routed_mixtures
from btm_cluster.study.pretrained import study_of
from btm_cluster.study.repeat import Repeat, branches, fill_in, train, with_milestones
from btm_cluster.study.repeats import repeats_of

AT_EXPERTS_RATE = System("transformer-lm at the experts' rate")
BEST_AT_EXPERTS_RATE = System("transformer-lm at the experts' rate, at its best milestone")
PRIORS = ("uniform", "argmax", "ema", "fitted")
"""The averages of parameters that are measured: the paper's three, and the posterior by the fitted prior."""


@dataclass(frozen=True)
class Study:
    """The outcome of a study."""

    entries: tuple[Mapping[str, Any], ...]
    """A row for each system, size and random seed: perplexities on test text."""
    texts: tuple[TextReport, ...]
    speeds: tuple[Mapping[str, Any], ...]
    """Updates and tokens per second of each kind of training."""
    trials: tuple[Mapping[str, Any], ...]
    """The Transformer-LM's perplexity on the domains' development text, for each recipe that was tried."""
    growth: tuple[Mapping[str, Any], ...]
    """A row for each step and system of a forest that is grown step by step."""
    repeats_left: int
    """Sizes and random seeds that are still to come."""


def run_study(plan: Plan, driver: Driver) -> Iterator[Study]:
    """Trains and compares everything that `plan.study` names; without one, the plan's
    own model with all rivals and controls.

    Yields what is known after each size and random seed, so that the first results need not wait for the
    last.

    Raises:
        UserError: a study that is at odds with itself: a share that leaves a seed or an expert without an
        update, say.
        StepError: something could not be trained; the rest is kept, and the same command goes on.
    """
    study = study_of(plan)
    driver.listener.part("texts and trials first")
    repeats = repeats_of(plan.model_copy(update={"study": study}), driver)
    texts = tuple(report_texts(repeats[0].prepared, driver))
    trials = tuple(trial for repeat in repeats for trial in repeat.trials)
    entries: list[Mapping[str, Any]] = []
    speeds: list[Mapping[str, Any]] = []
    grown: list[Mapping[str, Any]] = []
    for number, repeat in enumerate(repeats, 1):
        name = f"{repeat.size}, random seed {repeat.prepared.plan.training.random_seed}"
        driver.listener.part(f"part {number} of {len(repeats)}: {name}")
        models, trained = train_repeat(repeat, driver)
        comparison = compare(repeat.prepared, models, driver)
        if "adapted" in study.systems:
            adapted = adapt(repeat, models.transformer_lm, models.ensembles[0], driver)
            comparison = comparison.with_rows(adapted)
        entries += entries_of(repeat, comparison, models.stopped_at, driver.ledger)
        speeds += [_speed(repeat, request, model) for request, model in trained]
        if study.growth is not None and number == 1:
            driver.listener.part(f"part {number} of {len(repeats)}: {name}, growth")
            grown += measure_growth(repeat, study.growth, models.ensembles[0], driver)
        rows = (tuple(entries), texts, tuple(speeds), trials, tuple(grown))
        yield Study(*rows, repeats_left=len(repeats) - number)


def train_repeat(repeat: Repeat, driver: Driver) -> tuple[Models, list[tuple[TrainRequest, Artifact]]]:
    """All models of a repeat: first the one run that all seeds lie on, then what
    branches from it, then what follows it."""
    prepared, prepared_by_share, seeds = repeat.prepared, repeat.prepared_by_share, repeat.seeds
    assert prepared.plan.study is not None
    systems = prepared.plan.study.systems
    whole = repeat.transformer_lm()
    scratch = (
        [scratch_request(prepared, d, i) for i, d in enumerate(prepared.domains)]
        if 0 in prepared_by_share and 0 not in seeds
        else []
    )
    demix = [demix_request(prepared)] if "demix" in systems else []
    trained = train(repeat, [whole, *demix, *scratch], driver)
    fill_in(repeat, list(seeds.values()), driver)

    first = repeat.seed_shares[0]
    experts = {share: branches(repeat, prepared.domains, share) for share in seeds}
    parts = _random_parts(prepared, driver) if "random-split" in systems else []
    dealt = [replace(expert, snapshots=()) for expert in branches(repeat, parts, first)]
    demix_from_seed = (
        [seeded_demix_request(prepared, seeds[first].ref)] if "demix-from-seed" in systems else []
    )
    at_experts_rate = _at_experts_rate(repeat)
    branched = [*(expert for share in seeds for expert in experts[share]), *dealt, *demix_from_seed]
    known = {request.ref for request in branched}
    branched += [e for other in repeat.others for e in experts_of(other) if e.ref not in known]
    trained += train(repeat, branched, driver, at_experts_rate)
    made = {request.ref for request, _ in trained}
    experts |= {0.0: scratch} if scratch else {}

    members = partial(_members, repeat)
    forests = [members(FOREST, share, prepared.domains, experts[share]) for share in repeat.seed_shares]
    seeded = with_seed(forests[0], (*FEW_METHODS, PRIOR_ALONE, GATE_FOR_ALL, GATE))
    seeded = replace(seeded, averages=("learned",))
    forests[0] = replace(forests[0], methods=MANY_METHODS, averages=(*PRIORS, "greedy"))
    others = [members("random-split", first, parts, dealt)] if dealt else []
    others += [Ensemble(DEMIX, _named(prepared, request), FEW_METHODS) for request in demix]
    at_rate = [request for request in at_experts_rate if request.ref in made]
    others += [
        Ensemble(name, _named(prepared, request), FEW_METHODS, (), seeds[first].ref, first)
        for name, requests in ((SEEDED_DEMIX, demix_from_seed), (SEEDED_DEMIX_AT_EXPERTS_RATE, at_rate))
        for request in requests
        if request.is_demix
    ]
    stopped_at: dict[str, int] = {}
    if repeat.stops_early:
        stopped, stopped_at = _stopped_experts(prepared, forests[0], experts[first], driver)
        others.append(stopped)
    controls = _controls(repeat, at_rate, driver)
    milestones = transformer_lm_milestones(prepared, seeds[first].ref)
    otherwise = [(other.prepared, forest_of(other)) for other in repeat.others]
    is_routed = "mixture-of-experts" in systems
    mixtures = routed_mixtures([(prepared, forests[0]), *otherwise]) if is_routed else {}
    ensembles = (forests[0], seeded, *forests[1:], *others, *(forest for _, forest in otherwise))
    return Models(whole.ref, controls, milestones, ensembles, mixtures, stopped_at), trained


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


def _controls(repeat: Repeat, at_rate: Sequence[TrainRequest], driver: Driver) -> dict[System, Ref]:
    """The Transformer-LM at the experts' rate, where it was trained; and at its best milestone, where experts are
    stopped early and that is not its end."""
    whole = next((request for request in at_rate if not request.is_demix), None)
    if whole is None:
        return {}
    controls = {AT_EXPERTS_RATE: whole.ref}
    if repeat.stops_early:
        (best,) = best_milestones(repeat.prepared, [(whole, repeat.prepared.domains)], driver)
        if best.model != whole.ref:
            controls[BEST_AT_EXPERTS_RATE] = best.model
    return controls


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


def entries_of(
    repeat: Repeat, comparison: Comparison, stopped_at: Mapping[str, int], ledger: Ledger
) -> list[Mapping[str, Any]]:
    """The comparison as plain values, one entry for each system. Costs are told from what is in the store, and of
    experts stopped early each one's update."""
    plan, model = repeat.prepared.plan, repeat.prepared.model
    costs = costs_of(comparison, model, plan.training.block_tokens, ledger)
    first_update = plan.training.seed_updates if repeat.is_from_pretrained else 0
    tokens = (plan.training.updates - first_update) * len(repeat.prepared.founders)
    tokens *= plan.training.blocks_per_domain_update * plan.training.block_tokens
    parameters = count_parameters(model)[1]
    demix_parameters = count_demix_parameters(model, len(repeat.prepared.founders))[1]
    common = {
        "size": repeat.size,
        "tokens": tokens,
        "experts": len(repeat.prepared.domains),
        "random_seed": plan.training.random_seed,
    }
    return [
        common
        | {"non_embedding_parameters": demix_parameters if entry["system"] in DEMIXES else parameters}
        | entry
        | ({"stopped_at": dict(stopped_at)} if entry["system"] == STOPPED_FOREST else {})
        for entry in entries_from(repeat.prepared, comparison, costs)
    ]


def _speed(repeat: Repeat, request: TrainRequest, model: Artifact) -> Mapping[str, Any]:
    note = model.note
    rate = note["tokens_per_second"] / (request.blocks_per_update * request.training.block_tokens)
    return {
        "size": repeat.size,
        "role": _role(request),
        "blocks_per_update": request.blocks_per_update,
        "updates_per_second": round(rate, 2),
        "tokens_per_second": note["tokens_per_second"],
        "gpus": note["gpus"],
        "device": note["device"],
    }


def _role(request: TrainRequest) -> str:
    if request.trains.lora is not None:
        return f"{request.role}, LoRA of rank {request.trains.lora.rank}"
    return f"{request.role}, {request.trains.part}" if request.trains.is_delta else request.role
