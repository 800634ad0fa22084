"""The mixture of experts of a forest: which steps make it."""

from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.recipes import expert_resources
from btm_cluster.errors import TextError
from btm_cluster.evaluation.fitting import uniform_request
from btm_cluster.evaluation.systems import Ensemble
from btm_cluster.plan import MixtureOfExpertsPlan
from btm_cluster.requests import AverageRequest, MixtureOfExpertsRequest


def mixture_of_experts_requests(
    prepared: PreparedPlan, experts: Ensemble, wanted: MixtureOfExpertsPlan
) -> list[AverageRequest | MixtureOfExpertsRequest]:
    """The steps that make the mixture of a forest's experts, itself last. Its routers are fitted on as many
    development blocks of each domain as everything else.

    Raises:
        TextError: a domain has no development text.
    """
    assert experts.seed is not None
    tokens = {text.name: text.tokens["development"] for text in prepared.domains}
    without = [domain for domain, _ in experts.models if not tokens[domain]]
    if without:
        raise TextError(
            "a mixture of experts learns its routers on development text of every domain",
            found=f"none of {', '.join(without)}",
            remedy="name `development` files for them in the plan, or leave the mixture of experts out",
        )
    models = experts.refs
    suited = "seed" if prepared.plan.branching.train == "feed-forward" else "average"
    rest = wanted.rest or suited
    average = uniform_request(models, label=f"uniform{experts.of_which}")
    mixture = MixtureOfExpertsRequest(
        label=f"mixture of experts{experts.of_which} with the {rest}",
        models=models,
        rest=average.ref if rest == "average" else experts.seed,
        tokens=tuple(tokens[domain] for domain, _ in experts.models),
        experts_per_token=min(wanted.experts_per_token, len(models)),
        blocks=prepared.plan.merging.development_blocks,
        how=expert_resources(prepared.plan),
    )
    return [average, mixture] if rest == "average" else [mixture]
