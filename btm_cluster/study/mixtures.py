"""A study's forests as mixtures of experts."""

from collections.abc import Sequence
from dataclasses import replace

from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.evaluation.mixture_of_experts import mixture_of_experts_requests
from btm_cluster.evaluation.systems import Ensemble, System
from btm_cluster.plan import MixtureOfExpertsPlan
from btm_cluster.requests import StepRequest

EXPERTS_PER_TOKEN = (1, 2)
"""Feed-forwards of a layer that a token passes, of those that a router sends it to."""


def routed_mixtures(
    forests: Sequence[tuple[PreparedPlan, Ensemble]],
) -> dict[System, Sequence[StepRequest]]:
    """The steps that make each forest's mixtures, by row. Beside a forest is the plan by which its experts are
    trained.

    Raises:
        TextError: a domain has no development text.
    """
    return {
        forest.routed_to(count): _mixture(prepared, forest, count)
        for prepared, forest in forests
        for count in EXPERTS_PER_TOKEN[: len(forest.models)]
    }


def _mixture(prepared: PreparedPlan, forest: Ensemble, experts_per_token: int) -> list[StepRequest]:
    planned = prepared.plan.merging.mixture_of_experts or MixtureOfExpertsPlan()
    wanted = planned.model_copy(update={"experts_per_token": experts_per_token})
    *before, mixture = mixture_of_experts_requests(prepared, forest, wanted)
    return [*before, replace(mixture, label=f"{mixture.label}, top-{experts_per_token}")]
