"""Models that a plan has still to train: experts of new domains, where each starts, and the baselines."""

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import demix_request, seed_request, transformer_lm_request
from btm_cluster.forest import Forest
from btm_cluster.requests import TrainRequest


def new_domains(prepared: PreparedPlan, forest: Forest) -> list[PreparedText]:
    """The plan's domains that have no expert yet."""
    texts = {expert.domain: expert.text for expert in forest.experts}
    return [domain for domain in prepared.domains if texts.get(domain.name) != domain.identity]


def starts_from_seed(prepared: PreparedPlan, forest: Forest | None, domain: PreparedText) -> bool:
    """Whether a new expert starts from the seed itself: the founding domains' do, even if their first
    training failed and their siblings are merged by now; those of later domains where the plan says so, or
    while there is nothing to average.
    """
    if forest is None or not forest.experts or prepared.plan.branching.start == "seed":
        return True
    return (domain.name, domain.identity) in forest.foundation.domains


def baseline_requests(prepared: PreparedPlan) -> list[TrainRequest]:
    """The plan's baselines."""
    seed = seed_request(prepared).ref
    named = {"transformer-lm": transformer_lm_request(prepared, seed), "demix": demix_request(prepared)}
    return [named[name] for name in prepared.plan.baselines]
