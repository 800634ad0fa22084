"""What a plan has still to train: domains without an expert, where each starts, and the groups that the trainings ask for."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from btm_cluster.forest import Forest
from btm_cluster.ground import Ground, PreparedText, ground_of
from btm_cluster.ledger import THREADS, Artifact, Ledger, Ref
from btm_cluster.plan import Plan
from btm_cluster.recipes import (
    demix_request,
    expert_request,
    expert_resources,
    seed_request,
    seed_resources,
    seed_start,
    transformer_lm_request,
)
from btm_cluster.records import branch_point_identity, find_branch_point
from btm_cluster.requests import Pretrained, Resources, TrainRequest
from btm_cluster.room import Ask


def new_domains(ground: Ground, forest: Forest) -> list[PreparedText]:
    """The plan's domains that have no expert yet."""
    texts = {expert.domain: expert.text for expert in forest.experts}
    return [domain for domain in ground.domains if texts.get(domain.name) != domain.identity]


def starts_from_seed(ground: Ground, forest: Forest | None, domain: PreparedText) -> bool:
    """Whether a new expert starts from the seed itself: the founding domains' do, even if their first training failed and
    their siblings are merged by now; those of later domains where the plan says so, or while there is nothing to average.
    """
    if forest is None or not forest.experts or ground.plan.branching.start == "seed":
        return True
    return (domain.name, domain.identity) in forest.foundation.domains


def resumed(request: TrainRequest, ledger: Ledger, new_resources: bool = False) -> TrainRequest:
    """The request with the resources of its first start, where it was started before: results depend on them.

    With `new_resources` it goes on with its own, which the model's profile then tells by spans of updates.
    """
    saved = None if new_resources else ledger.latest_training(request.ref.identity)
    if saved is None:
        return request
    return replace(request, how=Resources(**saved.facts["how"]), saved_at=int(saved.recipe["update"]))


def rivals(ground: Ground) -> list[TrainRequest]:
    """The plan's baselines."""
    seed = seed_request(ground).ref
    named = {"transformer-lm": transformer_lm_request(ground, seed), "demix": demix_request(ground)}
    return [named[name] for name in ground.plan.baselines]


def asks_of(
    plan: Plan,
    known: Mapping[str, Artifact],
    model: tuple[Mapping[str, Any], Pretrained | None],
    ledger: Ledger,
    new_resources: bool = False,
) -> tuple[Ask, ...]:
    """The groups that a run's trainings ask for: those to come, with the resources of their checkpoints. Equal ones once.

    `known` are the read results of the plan's texts, by name. An expert whose text is not read, or whose start must be
    computed, asks for what the plan says.
    """
    forest = ledger.log.newest()
    if forest is None and len(known) < len(plan.texts):
        return _distinct([Ask("seed", seed_resources(plan)), Ask("an expert", expert_resources(plan))])
    parts = {part: tuple(t for t in getattr(plan, part) if t.name in known) for part in ("domains", "targets")}
    ground = ground_of(plan.model_copy(update=parts), known, model, ledger)
    requests = [seed_request(ground)] if forest is None else []
    unknown = [d for d in plan.domains if d.name not in known and (forest is None or d.name not in forest.domains)]
    asks = [Ask("an expert", expert_resources(plan))] if unknown else []
    for domain in ground.domains if forest is None else new_domains(ground, forest):
        request = _expert_to_come(ground, forest, domain, ledger)
        if request is None:
            asks.append(Ask("an expert", expert_resources(plan)))
        else:
            requests.append(request)
    requests += rivals(ground)
    missing = [
        r for r, found in zip(requests, ledger.find_all([r.ref for r in requests]), strict=True) if found is None
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        asks += [_ask(request) for request in pool.map(lambda r: resumed(r, ledger, new_resources), missing)]
    return _distinct(asks)


def _expert_to_come(ground: Ground, forest: Forest | None, domain: PreparedText, ledger: Ledger) -> TrainRequest | None:
    """The request of a domain's expert; None where its start is an average that is not settled yet."""
    seed = Ref("model", forest.foundation.seed) if forest is not None else seed_request(ground).ref
    if starts_from_seed(ground, forest, domain):
        return expert_request(ground, domain, seed_start(ground, seed))
    point = find_branch_point(ledger, branch_point_identity(domain.name, domain.identity, seed.identity))
    return None if point is None else expert_request(ground, domain, point.start)


def _ask(request: TrainRequest) -> Ask:
    label = request.label
    if request.role == "expert":
        label = "an expert" if request.saved_at is None else f"expert {request.label}"
    return Ask(label, request.how, request.saved_at)


def _distinct(asks: list[Ask]) -> tuple[Ask, ...]:
    """One for each group of the same size, and one for each training that goes on."""
    seen: dict[tuple[Resources, str], Ask] = {}
    for ask in asks:
        seen.setdefault((ask.how, ask.label if ask.saved_at is not None else ""), ask)
    return tuple(seen.values())
