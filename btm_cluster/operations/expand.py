"""`btm expand`: the domains that the plan or the inbox has and the forest has
not become experts, and a new version.

Where each starts is settled in the store first, so that whoever resumes it, and whatever else the forest has
grown by then, it is the same expert. Nothing that exists is trained or scored again; with nothing to add,
nothing is started.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from btm_cluster.algorithm import merge, settled_branches, train
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Failure
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.expansion.acceptance import Gain, judge
from btm_cluster.expansion.arrivals import PreparedArrivals, prepare_new
from btm_cluster.expansion.inbox import Inbox, look
from btm_cluster.forest import Forest, describe_forest
from btm_cluster.ledger import THREADS, Ledger
from btm_cluster.ledger.records import branch_point_identity, find_branch_point, hold, newest_held
from btm_cluster.ledger.versions import newest_version
from btm_cluster.plan import Plan


@dataclass(frozen=True)
class Expanded:
    """The outcome of an expansion. Reasons are by domain."""

    before: Forest
    forest: Forest
    waiting: Mapping[str, str]
    passed_over: Mapping[str, str]
    quarantined: Mapping[str, str]
    held: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, Gain] = field(default_factory=dict)
    """For the domains that this expansion trained and that stand in the forest now."""
    failures: tuple[Failure, ...] = ()
    made: Mapping[str, int] = field(default_factory=dict)
    reused: Mapping[str, int] = field(default_factory=dict)

    @property
    def added(self) -> tuple[str, ...]:
        """Domains that are in the forest now and were not, by whoever brought them."""
        return tuple(name for name in self.forest.domains if name not in self.before.domains)

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "forest": describe_forest(self.forest),
            "added": list(self.added),
            "gains": {name: asdict(gain) for name, gain in self.gains.items()},
            "held": dict(self.held),
            "quarantined": dict(self.quarantined),
            "waiting": dict(self.waiting),
            "passed_over": dict(self.passed_over),
            "failures": [asdict(failure) for failure in self.failures],
            "steps": {"run": dict(self.made), "reused": dict(self.reused)},
        }


@dataclass(frozen=True)
class New:
    """Domains of a plan and its inbox that the forest lacks."""

    plan: Plan
    """The plan without the domains that the forest has settled."""
    forest: Forest
    inbox: Inbox
    passed_over: Mapping[str, str]

    @property
    def named(self) -> tuple[str, ...]:
        """New domains of the plan."""
        return tuple(domain.name for domain in self.plan.domains)

    @property
    def domains(self) -> tuple[str, ...]:
        """All new domains."""
        return (*self.named, *(arrival.domain.name for arrival in self.inbox.arrivals))

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "forest": describe_forest(self.forest),
            "would_add": list(self.domains),
            "quarantined": dict(self.inbox.quarantined),
            "waiting": dict(self.inbox.waiting),
            "passed_over": dict(self.passed_over),
        }


def find_new(plan: Plan, ledger: Ledger) -> New:
    """Looks for domains that the forest has not settled. None of their text is read.

    Raises:
        UserError: there is no forest yet.
    """
    forest = newest_version(ledger)
    settled = {*forest.domains, *forest.withdrawn}
    named = tuple(domain for domain in plan.domains if domain.name not in settled)
    taken_out = [domain.name for domain in plan.domains if domain.name in forest.withdrawn]
    plan = plan.model_copy(update={"domains": named})
    inbox = look(ledger, plan, settled)
    return New(plan, forest, inbox, _passed_over(ledger, forest, inbox, taken_out))


def expand(plan: Plan, driver: Driver) -> Expanded:
    """Adds what is new.

    Domains of the forest are not looked at again, so the plan that founded it serves for ever.

    Raises:
        UserError: there is no forest yet, or the plan does not fit it.
    """
    found = find_new(plan, driver.ledger)
    plan, forest, inbox, passed_over = found.plan, found.forest, found.inbox, found.passed_over
    if not found.domains:
        return Expanded(forest, forest, inbox.waiting, passed_over, inbox.quarantined)
    # What is not judged is not read either.
    targets = plan.targets if plan.expansion.accept_if is not None else ()
    new = prepare_new(plan.model_copy(update={"targets": targets}), inbox.arrivals, forest, driver)
    return _grow(new, forest, inbox, passed_over, driver)


def _grow(
    new: PreparedArrivals, forest: Forest, inbox: Inbox, passed_over: Mapping[str, str], driver: Driver
) -> Expanded:
    ledger, prepared = driver.ledger, new.prepared
    held = _still_held(prepared, forest, ledger)
    domains = [domain for domain in prepared.domains if domain.name not in held]
    contents = {arrival.domain.name: arrival.contents for arrival in inbox.arrivals}
    experts, failures = train(settled_branches(prepared, forest, domains, contents, driver), driver)
    judgement = judge(prepared, ledger.log.newest() or forest, experts, driver)
    for one in judgement.held.values():
        hold(ledger, one)
    merged = merge(forest, judgement.accepted, ledger)
    return Expanded(
        before=forest,
        forest=ledger.log.newest() or merged,
        waiting=inbox.waiting,
        passed_over=passed_over,
        quarantined={**inbox.quarantined, **new.refused},
        held=held | {name: one.reason for name, one in judgement.held.items()},
        gains=judgement.gains,
        failures=(*new.failures, *failures),
        made=driver.made,
        reused=driver.reused,
    )


def _passed_over(ledger: Ledger, forest: Forest, inbox: Inbox, taken_out: Sequence[str]) -> dict[str, str]:
    """Settled domains that the inbox has, and those of the plan that were taken out, with why they are passed
    over: taken out, or other files than their expert was trained on, which a plan may have named."""
    names = [*taken_out, *(name for name in inbox.known if name in forest.withdrawn)]
    why = (
        "it was taken out of the forest; unless it was purged, `btm forest remove {} --undo` brings it back; give "
        "new text a new name"
    )
    reasons = {name: why.format(name) for name in names}
    texts = {expert.domain: expert.text for expert in forest.experts if expert.domain in inbox.known}
    identities = [branch_point_identity(name, text, forest.foundation.seed) for name, text in texts.items()]
    with ThreadPoolExecutor(THREADS) as pool:
        points = pool.map(lambda identity: find_branch_point(ledger, identity), identities)
    for name, one in zip(texts, points, strict=True):
        if one is None or not one.contents:
            reasons[name] = "the forest has an expert of that name, of other text; give new text a new name"
        elif one.contents != inbox.known[name]:
            reasons[name] = (
                "its files are no longer those its expert was trained on; give new text a new name"
            )
    return reasons


def _still_held(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> dict[str, str]:
    """Domains that were judged before and that the plan would still hold back, with the reason of then."""
    limit = prepared.plan.expansion.accept_if
    if limit is None:
        return {}
    judged = newest_held(ledger)
    held = {
        d.name: judged.get(branch_point_identity(d.name, d.identity, forest.foundation.seed))
        for d in prepared.domains
    }
    allowed = limit.development_perplexity_rise_at_most
    return {name: one.reason for name, one in held.items() if one is not None and one.rise > allowed}
