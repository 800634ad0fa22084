"""Branch-Train-Merge itself. The driver is the paper: prepare the texts, plant a seed, branch, train, merge.

Source: Li, Gururangan et al., 2022, section 3. Asks the workers for everything that takes time, and reads and appends
the forest log.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from btm_cluster.driver import Driver
from btm_cluster.equations.averaging import uniform_weights
from btm_cluster.errors import StoreError, TextError
from btm_cluster.evaluation import average_weights
from btm_cluster.forest import Expert, Forest, Parent, check_merge, merge_into
from btm_cluster.founding import check_foundation, check_texts
from btm_cluster.ground import (
    Ground,
    PreparedText,
    block_requests,
    ground_of,
    model_config,
    read_requests,
    tokenizer_request,
    vocabulary_of,
    without_texts,
    without_withdrawn,
)
from btm_cluster.ledger import THREADS, Artifact, Ledger, Ref
from btm_cluster.outstanding import asks_of, new_domains, resumed, starts_from_seed
from btm_cluster.plan import Plan
from btm_cluster.recipes import (
    average_request,
    check_demix,
    demix_request,
    expert_request,
    seed_request,
    seed_start,
    transformer_lm_request,
)
from btm_cluster.records import BranchPoint, branch_point_identity, find_branch_point, settle_branch_point
from btm_cluster.requests import Start, Tokenize, TrainRequest
from btm_cluster.workers import Failure, Outcome

MERGE_ATTEMPTS = 100


@dataclass(frozen=True)
class Grown:
    """What a run of a plan ends in: the forest, the baseline where it was asked for, and what failed."""

    ground: Ground
    forest: Forest
    baseline: Ref | None
    failures: tuple[Failure, ...]
    demix: tuple[Ref, ...] = ()
    """The models that a DEMix is for each founding domain."""


def grow(plan: Plan, driver: Driver) -> Grown:
    """Branch-Train-Merge: from a plan to a forest with an expert for each of its domains."""
    ground = prepare(plan, driver, trains=True)
    forest = plant(ground, driver)
    branches = branch(ground, forest, driver)
    experts, failures = train(branches, driver)
    forest = merge(forest, experts, driver.ledger)
    baseline, failed = train_baseline(ground, driver)
    demix, failed_demix = train_demix(ground, driver)
    return Grown(ground, forest, baseline, (*failures, *failed, *failed_demix), demix)


def prepare(plan: Plan, driver: Driver, trains: bool = False) -> Ground:
    """Texts to documents, documents to token blocks, and the configuration that all models share.

    Where it `trains` afterwards, asks that can never be met are refused before a text is read.
    """
    workers, forest = driver.workers, driver.ledger.log.newest()
    plan = without_withdrawn(plan, forest)
    requests = read_requests(plan)
    model = model_config(plan, vocabulary_of(plan))  # a wrong model is refused before a text is read
    check_demix(plan, model[0], driver.ledger.log.version(0))
    bare = without_texts(plan, model, driver.ledger)
    if forest is not None:
        check_foundation(bare, forest, driver.ledger)
    if trains:
        found = zip(requests, driver.ledger.find_all([request.ref for request in requests]), strict=True)
        known = {request.label: memo for request, memo in found if memo is not None}
        driver.check_room(asks_of(plan, known, model, driver.ledger, driver.new_resources))
    if model[1] is not None:  # it needs no text, and may turn out to be unusable
        driver.require(workers.prepare, [tokenizer_request(plan, ())])
        driver.require(workers.train, [seed_request(bare)])
    read = driver.require(workers.prepare, requests)
    memos = {text.name: memo for text, memo in zip(plan.texts, read, strict=True)}
    ground = ground_of(plan, memos, model, driver.ledger)
    if forest is not None:  # what does not fit is refused before anything is made
        check_texts(ground, forest, driver.ledger)
    driver.require(workers.prepare, [tokenizer_request(plan, ground.founders)])
    _tokenize(block_requests(ground), forest is not None, driver)
    return ground


def plant(ground: Ground, driver: Driver) -> Forest:
    """Version 0: the seed, and what all later versions inherit from it. A plan that changes that is refused."""
    request = seed_request(ground)
    foundation = ground.foundation(request.ref.identity)
    forest = driver.ledger.log.newest()
    if forest is not None:
        return forest
    seed = driver.require(driver.workers.train, [resumed(request, driver.ledger, driver.new_resources)])[0]
    manifests = {seed.identity: seed.manifest_hash}
    driver.ledger.log.append(Forest(0, foundation, (), manifests, reason=f"planted by {ground.plan.name}"))
    planted = driver.ledger.log.newest()  # ours, or that of whoever was first
    assert planted is not None
    check_foundation(ground, planted, driver.ledger)
    return planted


def branch(ground: Ground, forest: Forest, driver: Driver) -> list[TrainRequest]:
    """Where each domain's expert starts: the first batch from the seed, later ones as the plan says, all from one forest."""
    return settled_branches(ground, forest, new_domains(ground, forest), {}, driver)


def settled_branches(
    ground: Ground, forest: Forest, domains: Sequence[PreparedText], contents: Mapping[str, str], driver: Driver
) -> list[TrainRequest]:
    """A request for each domain's expert. Where a later domain's starts is settled in the store before anything of it is made.

    Whoever resumes it, and whatever the forest has grown by then, it is the same expert. A founding domain's follows from
    the foundation. `contents` is what lies in the inbox, by domain.
    """
    ledger, seed = driver.ledger, forest.foundation.seed
    later = [domain for domain in domains if (domain.name, domain.identity) not in forest.foundation.domains]
    identities = [branch_point_identity(domain.name, domain.identity, seed) for domain in later]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda identity: find_branch_point(ledger, identity), identities)
    starts = {one.domain: one.start for one in found if one is not None}
    new = [domain for domain in domains if domain.name not in starts]
    base_hash = ledger.log.version_hash(forest.version) if new else ""
    for domain, start in zip(new, starts_for(ground, forest, new, driver), strict=True):
        if domain not in later:
            starts[domain.name] = start
            continue
        files = contents.get(domain.name, "")
        wanted = BranchPoint(domain.name, domain.identity, seed, forest.version, base_hash, start, files)
        starts[domain.name] = settle_branch_point(ledger, wanted).start
    return [expert_request(ground, domain, starts[domain.name]) for domain in domains]


def starts_for(ground: Ground, forest: Forest, new: Sequence[PreparedText], driver: Driver) -> list[Start]:
    """A start for each new domain, in order."""
    later = [domain for domain in new if not starts_from_seed(ground, forest, domain)]
    averaged = iter(averaged_starts(ground, forest, later, driver) if later else ())
    start = seed_start(ground, Ref("model", forest.foundation.seed))
    return [start if starts_from_seed(ground, forest, domain) else next(averaged) for domain in new]


def train(branches: Sequence[TrainRequest], driver: Driver) -> tuple[list[Expert], list[Failure]]:
    """The experts, in parallel and without communication. One that fails does not stop the others."""
    outcomes = driver.obtain(
        driver.workers.train, [resumed(request, driver.ledger, driver.new_resources) for request in branches]
    )
    pairs = list(zip(branches, outcomes, strict=True))
    experts = [_expert(request, outcome) for request, outcome in pairs if isinstance(outcome, Artifact)]
    return experts, [outcome for outcome in outcomes if isinstance(outcome, Failure)]


def merge(forest: Forest, experts: Sequence[Expert], ledger: Ledger) -> Forest:
    """The next version of the forest. Who loses the race for a number reads again and tries the next one."""
    if not experts:
        return forest
    manifests = {e.identity: ledger.get(Ref("model", e.identity)).manifest_hash for e in experts}
    forest = ledger.log.newest() or forest  # the log moved on meanwhile: what an older version names may be collected
    for _ in range(MERGE_ATTEMPTS):
        # Another driver may have added the same domain meanwhile, branched from another version: the first one stays.
        # And a domain that was taken out meanwhile stays out.
        new = [expert for expert in experts if expert.domain not in (*forest.domains, *forest.withdrawn)]
        check_merge(forest, {expert.domain: expert.text for expert in experts})
        if not new:
            return forest
        named = {expert.identity: manifests[expert.identity] for expert in new}
        ledger.check_all_standing({**forest.manifests, **named})
        ledger.log.append(merge_into(forest, new, named, reason="added " + ", ".join(e.domain for e in new)))
        newest = ledger.log.newest()
        assert newest is not None
        forest = newest
    raise StoreError("could not append to the forest log", found=f"{MERGE_ATTEMPTS} lost races", remedy="try again")


def train_baseline(ground: Ground, driver: Driver) -> tuple[Ref | None, list[Failure]]:
    """The compute-matched Transformer-LM, where the plan asks for it."""
    if "transformer-lm" not in ground.plan.baselines:
        return None, []
    outcome = _train_rival(transformer_lm_request(ground, seed_request(ground).ref), driver)
    return (None, [outcome]) if isinstance(outcome, Failure) else (outcome.ref, [])


def train_demix(ground: Ground, driver: Driver) -> tuple[tuple[Ref, ...], list[Failure]]:
    """The parts of a DEMix of the same compute, where the plan asks for it."""
    if "demix" not in ground.plan.baselines:
        return (), []
    request = demix_request(ground)
    outcome = _train_rival(request, driver)
    return ((), [outcome]) if isinstance(outcome, Failure) else (tuple(part.ref for part in request.parts), [])


def _train_rival(request: TrainRequest, driver: Driver) -> Outcome:
    if not all(text.tokens for text in request.texts) and driver.ledger.find(request.ref) is None:
        cause = (
            f"a founding domain was purged, and the {request.role} learns from all of them; take it out of `baselines`"
        )
        return Failure(request.label, 0, "in this store", cause)
    return driver.obtain(driver.workers.train, [resumed(request, driver.ledger, driver.new_resources)])[0]


def _tokenize(requests: Sequence[Tokenize], is_founded: bool, driver: Driver) -> None:
    tokenized = driver.require(driver.workers.prepare, requests)
    blocks: dict[tuple[str, str], int] = {}
    for request, artifact in zip(requests, tokenized, strict=True):
        key = (request.label, request.split)
        blocks[key] = blocks.get(key, 0) + artifact.facts["blocks"]
    for (name, split), count in blocks.items():
        if count == 0:
            raise TextError(
                f"the {split} text of {name!r} fills no block",
                expected=f"at least {requests[0].block_tokens} tokens",
                remedy="give it more text" + ("" if is_founded else ", or lower `training.block_tokens`"),
            )


def averaged_starts(ground: Ground, forest: Forest, new: Sequence[PreparedText], driver: Driver) -> list[Start]:
    """The average of the forest's experts for each new domain, by its posterior on the domain's text or uniformly."""
    weights = [uniform_weights(len(forest.experts))] * len(new)
    if ground.plan.branching.start == "posterior":
        weights = average_weights(ground, forest, new, driver)
    requests = [
        average_request(ground, f"start of {domain.name}", forest, w) for domain, w in zip(new, weights, strict=True)
    ]
    averages = driver.require(driver.workers.average, requests)
    return [Start(a.ref, r.parents, keep_optimizer=False) for a, r in zip(averages, requests, strict=True)]


def _expert(request: TrainRequest, model: Artifact) -> Expert:
    assert request.start is not None
    parents = tuple(Parent(parent.identity, parent.weight) for parent in request.start.parents)
    weights = model.blob("model.safetensors").sha256
    return Expert(request.label, model.identity, weights, request.texts[0].identity, parents)
