"""Branch-Train-Merge itself.

The driver is the paper: prepare the texts, train the seed, branch, train, merge.

Source: Li, Gururangan et al., 2022, section 3. Asks the workers for everything that takes time, and reads and
appends the forest log.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

from btm_cluster.driver.driver import Driver, find_made, require_all
from btm_cluster.driver.founding import check_foundation
from btm_cluster.driver.outstanding import baseline_requests, new_domains, starts_from_seed
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.preparation import read, tokenize
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import expert_request, seed_request, seed_start
from btm_cluster.errors import StoreError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import averaged_starts
from btm_cluster.forest import Expert, Forest, Parent, check_merge, merge_into
from btm_cluster.ledger import THREADS, Artifact, Ledger, Ref
from btm_cluster.ledger.records import (
    Baseline,
    BranchPoint,
    branch_point_identity,
    find_branch_point,
    record_baseline,
    settle_branch_point,
)
from btm_cluster.plan import Plan
from btm_cluster.requests import Start, StepRequest, TrainRequest
from btm_cluster.steps.stored import weights_sha256

MERGE_ATTEMPTS = 100


@dataclass(frozen=True)
class Grown:
    """The outcome of growing: the forest, the baseline where it was asked for, and what failed."""

    prepared: PreparedPlan
    forest: Forest
    baseline: Ref | None
    failures: tuple[Failure, ...]
    demix: tuple[Ref, ...] = ()
    """The models that a DEMix is for each founding domain."""


Alongside: TypeAlias = Callable[[PreparedPlan, Forest, Sequence[TrainRequest]], Iterable[StepRequest]]
"""Steps on what is grown, which are asked for with it: given the forest to come and its baselines."""


def grow(plan: Plan, driver: Driver, alongside: Alongside = lambda *_: ()) -> Grown:
    """Branch-Train-Merge: from a plan to a forest with an expert for each of its domains.

    Seed, experts and baselines are asked for together, and each starts once its inputs are there. The forest
    is merged as soon as its experts are done, whatever the baselines and the steps `alongside` still do.
    """
    prepared, forest = read(plan, driver), driver.ledger.log.newest()
    seed = seed_request(prepared)
    driver.get_ready([] if forest else [seed])
    tokenize(prepared, driver)
    branches = branch(prepared, forest, driver)
    baselines, impossible = baselines_to_train(prepared, driver.ledger)
    follow = alongside(prepared, forest_to_come(prepared, forest, branches), baselines)
    outcomes: dict[Ref, Outcome] = {}
    merged: Forest | None = None
    with closing(driver.run([*([] if forest else [seed]), *branches, *baselines, *follow])) as steps:
        for request, outcome in steps:
            outcomes[request.ref] = outcome
            if forest is None and request.ref == seed.ref:
                forest = found(prepared, outcome, driver)
            if forest and not merged and all(one.ref in outcomes for one in branches):
                merged = merge(forest, experts_among(branches, outcomes, driver.ledger), driver.ledger)
    forest = merged or forest
    assert forest is not None
    made = [request for request in baselines if isinstance(outcomes[request.ref], Artifact)]
    for request in (one for trained in made for one in (trained, *trained.at_snapshots)):
        record_baseline(driver.ledger, Baseline(request.role, request.ref.identity, forest.version))
    failures = [
        one for request in (*branches, *baselines) if isinstance(one := outcomes[request.ref], Failure)
    ]
    baseline = next((request.ref for request in made if not request.is_demix), None)
    demix = next((request.parts for request in made if request.is_demix), ())
    return Grown(prepared, forest, baseline, (*failures, *impossible), tuple(part.ref for part in demix))


def forest_to_come(prepared: PreparedPlan, forest: Forest | None, branches: Sequence[TrainRequest]) -> Forest:
    """The forest once all branches are trained and merged, as far as it is known before."""
    new = [Expert(request.label, request.ref.identity, "", request.texts[0].text, ()) for request in branches]
    foundation = forest.foundation if forest else prepared.foundation(seed_request(prepared).ref.identity)
    experts = sorted([*(forest.experts if forest else ()), *new], key=lambda expert: expert.domain)
    return Forest(0, foundation, tuple(experts), {}, reason="still to be grown")


def found(prepared: PreparedPlan, seed: Outcome, driver: Driver) -> Forest:
    """Version 0: the seed, and what all later versions inherit from it. A plan that changes that is refused.

    Raises:
        StepError: the seed could not be trained.
    """
    (model,) = require_all([seed])
    foundation = prepared.foundation(model.identity)
    manifests = {model.identity: model.manifest_hash}
    driver.ledger.log.append(Forest(0, foundation, (), manifests, reason=f"founded by {prepared.plan.name}"))
    founded = driver.ledger.log.newest()  # ours, or that of whoever was first
    assert founded is not None
    check_foundation(prepared, founded, driver.ledger)
    return founded


def branch(prepared: PreparedPlan, forest: Forest | None, driver: Driver) -> list[TrainRequest]:
    """Where each domain's expert starts: the first batch from the seed, later ones
    as the plan says, all from one forest."""
    if forest is None:
        start = seed_start(prepared, seed_request(prepared).ref)
        return [expert_request(prepared, domain, start) for domain in prepared.domains]
    return settled_branches(prepared, forest, new_domains(prepared, forest), {}, driver)


def settled_branches(
    prepared: PreparedPlan,
    forest: Forest,
    domains: Sequence[PreparedText],
    contents: Mapping[str, str],
    driver: Driver,
) -> list[TrainRequest]:
    """A request for each domain's expert.

    Where a later domain's starts is settled in the store before anything of it is made.

    Whoever resumes it, and whatever the forest has grown by then, it is the same expert. A founding domain's
    follows from the foundation. `contents` is what lies in the inbox, by domain.
    """
    ledger, seed = driver.ledger, forest.foundation.seed
    later = [domain for domain in domains if (domain.name, domain.identity) not in forest.foundation.domains]
    identities = [branch_point_identity(domain.name, domain.identity, seed) for domain in later]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda identity: find_branch_point(ledger, identity), identities)
    starts = {one.domain: one.start for one in found if one is not None}
    new = [domain for domain in domains if domain.name not in starts]
    base_hash = ledger.log.version_hash(forest.version) if new else ""
    for domain, start in zip(new, starts_for(prepared, forest, new, driver), strict=True):
        if domain not in later:
            starts[domain.name] = start
            continue
        files = contents.get(domain.name, "")
        wanted = BranchPoint(domain.name, domain.identity, seed, forest.version, base_hash, start, files)
        starts[domain.name] = settle_branch_point(ledger, wanted).start
    return [expert_request(prepared, domain, starts[domain.name]) for domain in domains]


def starts_for(
    prepared: PreparedPlan, forest: Forest, new: Sequence[PreparedText], driver: Driver
) -> list[Start]:
    """A start for each new domain, in order."""
    later = [domain for domain in new if not starts_from_seed(prepared, forest, domain)]
    averaged = iter(
        averaged_starts(prepared, forest_ensemble(prepared, forest), later, driver) if later else ()
    )
    start = seed_start(prepared, Ref("model", forest.foundation.seed))
    return [start if starts_from_seed(prepared, forest, domain) else next(averaged) for domain in new]


def train(branches: Sequence[TrainRequest], driver: Driver) -> tuple[list[Expert], list[Failure]]:
    """The experts, in parallel and without communication. One that fails does not stop the others."""
    outcomes = {request.ref: outcome for request, outcome in driver.run(branches)}
    failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Failure)]
    return experts_among(branches, outcomes, driver.ledger), failures


def experts_among(
    branches: Sequence[TrainRequest], outcomes: Mapping[Ref, Outcome], ledger: Ledger
) -> list[Expert]:
    """The experts that were trained."""
    pairs = [(request, outcomes[request.ref]) for request in branches]
    return [_expert(request, outcome, ledger) for request, outcome in pairs if isinstance(outcome, Artifact)]


def merge(forest: Forest, experts: Sequence[Expert], ledger: Ledger) -> Forest:
    """The next version of the forest. Who loses the race for a number reads again and tries the next one."""
    if not experts:
        return forest
    manifests = {e.identity: ledger.get(Ref("model", e.identity)).manifest_hash for e in experts}
    # The log moved on meanwhile: what an older version names may be collected.
    forest = ledger.log.newest() or forest
    for _ in range(MERGE_ATTEMPTS):
        # Another driver may have added the same domain meanwhile, branched from another version: the first
        # one stays. And a domain that was taken out meanwhile stays out.
        new = [expert for expert in experts if expert.domain not in (*forest.domains, *forest.withdrawn)]
        check_merge(forest, {expert.domain: expert.text for expert in experts})
        if not new:
            return forest
        named = {expert.identity: manifests[expert.identity] for expert in new}
        ledger.check_all_standing({**forest.manifests, **named})
        _check_none_purged(new, ledger)
        ledger.log.append(merge_into(forest, new, named, reason="added " + ", ".join(e.domain for e in new)))
        _check_none_purged(new, ledger)  # a purge that began in between has taken them out, or is told to
        newest = ledger.log.newest()
        assert newest is not None
        forest = newest
    raise StoreError(
        "could not append to the forest log", found=f"{MERGE_ATTEMPTS} lost races", remedy="try again"
    )


def _check_none_purged(experts: Sequence[Expert], ledger: Ledger) -> None:
    refs = {ref for e in experts for ref in (Ref("model", e.identity), Ref("text", e.text))}
    for ref in sorted(ledger.tombstones.purged_among(refs), key=str):
        ledger.check_not_purged(ref)


def baselines_to_train(prepared: PreparedPlan, ledger: Ledger) -> tuple[list[TrainRequest], list[Failure]]:
    """The plan's baselines, and those that can never be trained, since a text
    that they learn from was purged."""
    asked = baseline_requests(prepared)
    lost = [
        request
        for request in asked
        if not all(text.tokens for text in request.texts) and find_made([request], ledger) == [None]
    ]
    impossible = [
        Failure(
            request.label,
            0,
            "in this store",
            f"a founding domain was purged, and the {request.role} learns from all of them; take it out of "
            "`baselines`",
        )
        for request in lost
    ]
    return [request for request in asked if request not in lost], impossible


def _expert(request: TrainRequest, model: Artifact, ledger: Ledger) -> Expert:
    assert request.start is not None
    start = ledger.get(request.start.model)
    weights = start.facts.get("weights", {start.identity: 1.0})
    parents = tuple(Parent(identity, weight) for identity, weight in weights.items())
    return Expert(request.label, model.identity, weights_sha256(model), request.texts[0].text, parents)
