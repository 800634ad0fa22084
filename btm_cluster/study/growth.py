"""A study of growth: a forest that is founded on some domains and gets the others one by one, as `btm expand`
adds them.

After each step it is measured on all texts, against a Transformer-LM that is retrained on the domains so far, and
in the end against a forest grown at once. Then domains are taken out of it. The tokenizer is that of all domains
throughout, so that perplexities per token can be compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import expert_request, seed_start, transformer_lm_milestones
from btm_cluster.evaluation.comparison import Comparer, Comparison
from btm_cluster.evaluation.costs import costs_of
from btm_cluster.evaluation.fitting import averaged_starts
from btm_cluster.evaluation.milestones import choose_milestone, milestone_scores
from btm_cluster.evaluation.scoring import by_ref
from btm_cluster.evaluation.systems import CALIBRATED, PAPERS, TRANSFORMER_LM, Ensemble
from btm_cluster.ledger import Ref
from btm_cluster.ledger.curves import read_rise
from btm_cluster.plan import GrowthPlan
from btm_cluster.requests import Start
from btm_cluster.study.comparison import entries_from
from btm_cluster.study.repeat import Repeat, branches, fill_in, train

METHODS = (PAPERS, CALIBRATED)
AT_ONCE, FOUNDED, BRANCH = "grown at once", "founding forest", " branch"
COPIED = ("system", "posterior", "prior", "eval", "all", "per_domain", "difference", "difference_interval")
"""Fields of a study's entries that those of a step have too."""


@dataclass(frozen=True)
class Retrained:
    """A Transformer-LM on the domains of a step."""

    whole: Ref
    best: Ref
    """At its best milestone."""


@dataclass(frozen=True)
class Step:
    """The forests as they stand after a change, and what they are held against."""

    change: str
    domains: tuple[str, ...]
    """Those of the forests, in the order in which they came."""
    forests: tuple[Ensemble, ...]
    retrained: Retrained


def measure_growth(
    repeat: Repeat, growth: GrowthPlan, at_once: Ensemble, driver: Driver
) -> list[dict[str, Any]]:
    """An entry of plain values for each step and system. `at_once` is the forest that was founded on all domains.

    Raises:
        StepError: something could not be trained.
    """
    at_once = replace(at_once, system=AT_ONCE, methods=METHODS, averages=())
    return list(_entries(repeat, list(grow_steps(repeat, growth, at_once, driver)), driver))


def grow_steps(repeat: Repeat, growth: GrowthPlan, at_once: Ensemble, driver: Driver) -> Iterator[Step]:
    """The forests after each step, once they are trained, and the Transformer-LMs, which are trained first."""
    domains = repeat.prepared.domains
    names = tuple(domain.name for domain in domains)
    kept = tuple(name for name in names if name not in growth.remove)
    steps = [names[:count] for count in range(growth.founders, len(names) + 1)]
    retrained = _retrain(repeat, [*steps, *([kept] if growth.remove else [])], driver)
    founding = _founded_on(repeat, names[: growth.founders])
    founded = _found(founding, domains[: growth.founders], driver)
    yield Step("founded", steps[0], (founded,), retrained[steps[0]])
    forests = tuple(replace(founded, system=f"{start}{BRANCH}") for start in growth.starts)
    for count, domain in enumerate(domains[growth.founders :], growth.founders + 1):
        forests = _add(founding, growth, forests, domain, driver)
        beside = (at_once,) if count == len(names) else ()
        yield Step(f"added {domain.name}", names[:count], (*forests, *beside), retrained[names[:count]])
    if growth.remove:
        left = tuple(_without(forest, growth.remove) for forest in (*forests, at_once))
        yield Step(f"removed {', '.join(growth.remove)}", kept, left, retrained[kept])


def _founded_on(repeat: Repeat, names: Sequence[str]) -> Repeat:
    """The repeat of a forest that is founded on these domains alone, by its first seed share."""
    prepared = repeat.prepared
    founders = tuple(founder for founder in prepared.founders if founder[0] in names)
    identities = {identity for _, identity in founders}
    texts = tuple(text for text in prepared.founding_texts if text.text in identities)
    size = f"{repeat.size}-of-{len(names)}"  # in labels
    return Repeat(size, replace(prepared, founders=founders, founding_texts=texts), repeat.seed_shares[:1])


def _retrain(
    repeat: Repeat, founded: Sequence[tuple[str, ...]], driver: Driver
) -> dict[tuple[str, ...], Retrained]:
    """A Transformer-LM on each set of domains, all at once."""
    repeats = {names: _founded_on(repeat, names) for names in founded}
    wholes = {
        names: replace(one.transformer_lm(), label=f"transformer-lm-{number}-of-{len(names)}-domains")
        for number, (names, one) in enumerate(repeats.items(), 1)
    }
    train(repeat, list(wholes.values()), driver)
    for one in repeats.values():
        fill_in(one, list(one.seeds.values()), driver)
    return {
        names: Retrained(whole.ref, _best_milestone(repeats[names], driver) or whole.ref)
        for names, whole in wholes.items()
    }


def _best_milestone(repeat: Repeat, driver: Driver) -> Ref | None:
    seed = repeat.seeds[repeat.seed_shares[0]].ref
    milestones = transformer_lm_milestones(repeat.prepared, seed)
    made = by_ref(driver.require(milestone_scores(repeat.prepared, milestones)))
    chosen = choose_milestone(repeat.prepared, milestones, driver.ledger, made)
    return None if chosen is None else milestones[chosen.best]


def _found(founding: Repeat, domains: Sequence[PreparedText], driver: Driver) -> Ensemble:
    """The forest of the founding domains."""
    share = founding.seed_shares[0]
    experts = [replace(expert, snapshots=()) for expert in branches(founding, domains, share)]
    train(founding, experts, driver)
    models = tuple((domain.name, expert.ref) for domain, expert in zip(domains, experts, strict=True))
    return Ensemble(FOUNDED, models, METHODS, (), founding.seeds[share].ref, share)


def _add(
    founding: Repeat,
    growth: GrowthPlan,
    forests: Sequence[Ensemble],
    domain: PreparedText,
    driver: Driver,
) -> tuple[Ensemble, ...]:
    """Each forest with an expert more, which starts as the forest's name says."""
    requests = []
    for start, forest in zip(growth.starts, forests, strict=True):
        branching = founding.prepared.plan.branching.model_copy(update={"start": start})
        prepared = founding.branching_by(branching).prepared
        request = expert_request(prepared, domain, _start(prepared, forest, domain, driver))
        requests.append(replace(request, label=f"{domain.name}-{start}-branch"))
    train(founding, requests, driver)
    return tuple(
        replace(forest, models=(*forest.models, (domain.name, request.ref)))
        for forest, request in zip(forests, requests, strict=True)
    )


def _start(prepared: PreparedPlan, forest: Ensemble, domain: PreparedText, driver: Driver) -> Start:
    assert forest.seed is not None
    if prepared.plan.branching.start == "seed":
        return seed_start(prepared, forest.seed)
    (start,) = averaged_starts(prepared, forest, [domain], driver)
    return start


def _without(forest: Ensemble, removed: Sequence[str]) -> Ensemble:
    return replace(forest, models=tuple(model for model in forest.models if model[0] not in removed))


@dataclass(frozen=True)
class _Spent:
    """Tokens and GPU-seconds of trainings; the seconds are None where some are not known."""

    tokens: int = 0
    gpu_seconds: float | None = 0.0

    def __add__(self, other: "_Spent") -> "_Spent":
        return _Spent(self.tokens + other.tokens, _sum(self.gpu_seconds, other.gpu_seconds))

    def __sub__(self, other: "_Spent") -> "_Spent":
        minus = None if other.gpu_seconds is None else -other.gpu_seconds
        return _Spent(self.tokens - other.tokens, _sum(self.gpu_seconds, minus))


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else round(one + other, 1)


def _entries(repeat: Repeat, steps: Sequence[Step], driver: Driver) -> Iterator[dict[str, Any]]:
    prepared = repeat.prepared
    spent: dict[str, _Spent] = {}
    retrained = set[Ref]()
    for number, step in enumerate(steps):
        comparison = _compare(prepared, step, driver)
        costs = costs_of(comparison, prepared.model, prepared.plan.training.block_tokens, driver.ledger)
        shown = {TRANSFORMER_LM.system, *(forest.system for forest in step.forests)}
        found = [e for e in entries_from(prepared, comparison, costs) if e["system"] in shown]
        before = dict(spent)
        rise = read_rise(driver.ledger, step.retrained.whole)
        for entry in found:
            earlier = _earlier(entry["system"], before)
            spent[entry["system"]] = total = _total(entry, earlier, step.retrained.whole in retrained)
            yield {
                "size": repeat.size,
                "random_seed": prepared.plan.training.random_seed,
                "step": number,
                "change": step.change,
                "domains": list(step.domains),
                **{name: entry[name] for name in COPIED},
                **_means(entry, step.domains, prepared),
                "bits_per_byte": entry["bits_per_byte"]["all"],
                "rise": asdict(rise) if rise and entry["system"] == TRANSFORMER_LM.system else None,
                **asdict(total - earlier),
                **{f"{name}_so_far": value for name, value in asdict(total).items()},
            }
        retrained.add(step.retrained.whole)


def _compare(prepared: PreparedPlan, step: Step, driver: Driver) -> Comparison:
    """The step's systems on test text. What is chosen at its best milestone has cost its whole training."""
    single = {TRANSFORMER_LM: step.retrained.best}
    comparison = Comparer(prepared, single, step.forests, ("test",)).compare(driver)
    return comparison.charging({TRANSFORMER_LM.system: (step.retrained.whole,)})


def _earlier(system: str, before: Mapping[str, _Spent]) -> _Spent:
    """The cost of a system before a step. A branch grows out of the founding forest."""
    founded = FOUNDED if system.endswith(BRANCH) else system
    return before.get(system, before.get(founded, _Spent()))


def _total(entry: Mapping[str, Any], earlier: _Spent, is_retrained: bool) -> _Spent:
    """The cost of all trainings so far: a Transformer-LM starts anew for domains that it was not trained on before, and
    a forest keeps what it has, also where it has become smaller."""
    cost = _Spent(entry["cost"]["training_tokens"], entry["cost"]["gpu_seconds"])
    if entry["system"] == TRANSFORMER_LM.system:
        return earlier if is_retrained else earlier + cost
    return max(earlier, cost, key=lambda spent: spent.tokens)


def _means(entry: dict[str, Any], known: Sequence[str], prepared: PreparedPlan) -> dict[str, float | None]:
    """Mean perplexities over the domains that the forests have, and over those that they have not."""
    values = {domain.name: entry["per_domain"][domain.name] for domain in prepared.domains}
    own = [value for name, value in values.items() if name in known]
    others = [value for name, value in values.items() if name not in known]
    return {"known": _mean(own), "unknown": _mean(others) if others else None}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
