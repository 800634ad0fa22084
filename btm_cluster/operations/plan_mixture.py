"""The cost of a plan's mixture of experts: the bytes that it is stored in, and the passes that it takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.language_model.mixture_of_experts import size_of_mixture
from btm_cluster.ledger import Ref
from btm_cluster.requests import MixtureOfExpertsRequest
from btm_cluster.workers.dry_walk import DryWalk


@dataclass(frozen=True)
class MixtureCost:
    """A mixture, and what the cost of making and scoring it follows from."""

    request: MixtureOfExpertsRequest
    stored_bytes: int
    tokens: float
    """Development tokens that a dense model reads to fit the routers."""
    inference_cost: float
    """Against a dense model."""


def mixture_costs(
    walk: DryWalk, prepared: PreparedPlan, tokens_of: Mapping[tuple[Ref, ...], float]
) -> Iterator[MixtureCost]:
    """The mixtures that a run asks for; `tokens_of` are the tokens of a text's split, by its blocks."""
    training = prepared.plan.training
    for request in walk.all_of(MixtureOfExpertsRequest):
        assert isinstance(request, MixtureOfExpertsRequest)
        size = size_of_mixture(prepared.model, len(request.models), request.experts_per_token)
        most = request.blocks * training.block_tokens
        yield MixtureCost(
            request,
            size.parameters * (4 if training.weights == "float32" else 2),
            sum(min(most, tokens_of.get(blocks, 0)) for blocks in request.tokens),
            size.inference_cost,
        )
