"""From a forest to the requests for averages whose weights are fitted: the search, then the average of what it found."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from btm_cluster.forest import Parent
from btm_cluster.ground import Ground, PreparedText
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.recipes import expert_resources
from btm_cluster.requests import AverageRequest, SoupRequest

BLOCKS_AT_ONCE = 8
"""Blocks per forward pass: searches share a GPU, and logits with their gradients take far more memory than small models."""


def soup_request(
    ground: Ground,
    strategy: Literal["greedy", "learned"],
    models: Sequence[Ref],
    text: PreparedText,
    starts: Sequence[Sequence[float]] = (),
) -> SoupRequest:
    """The search for a text's own average, on as many development blocks as its prior sees.

    `models` are experts, and the seed where it may have a part. Each of `starts` has a weight for each of them.
    """
    how = expert_resources(ground.plan)
    parents = tuple(tuple(Parent(m.identity, w) for m, w in zip(models, start, strict=True) if w) for start in starts)
    return SoupRequest(
        f"{strategy} soup for {text.name}",
        strategy,
        tuple(models),
        text.tokens["development"],
        ground.plan.merging.development_blocks,
        parents,
        replace(how, micro_batch_blocks=min(BLOCKS_AT_ONCE, how.micro_batch_blocks)),
    )


def soup_average_request(ground: Ground, label: str, found: Artifact, names: Mapping[str, str]) -> AverageRequest:
    """The average that a search found best. `names` says what to call each model in its card, by identity."""
    parents = tuple(Parent(identity, weight) for identity, weight in found.facts["weights"].items() if weight)
    return AverageRequest(label, parents, {"plan": ground.plan.name, **names})
