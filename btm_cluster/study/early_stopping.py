"""Models of a study that are stopped early: each at the milestone that is best on its own development text.

The Transformer-LM is compared at its best milestone. So is what else is trained to the end: each expert on its
domain, and the Transformer-LM at the experts' rate on all of them. The start is no milestone of an expert: it is
the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.evaluation.milestones import best_milestone
from btm_cluster.evaluation.scoring import by_ref, mean_perplexities, score_requests
from btm_cluster.evaluation.systems import Ensemble
from btm_cluster.ledger import Ref
from btm_cluster.requests import TrainRequest
from btm_cluster.study.branchings import METHODS

STOPPED_FOREST = "forest stopped early"


@dataclass(frozen=True)
class BestMilestone:
    """A training's best milestone, by update."""

    update: int
    model: Ref


def best_milestones(
    prepared: PreparedPlan,
    trained: Sequence[tuple[TrainRequest, Sequence[PreparedText]]],
    driver: Driver,
) -> list[BestMilestone]:
    """The best of each training's milestones and its end, by mean perplexity on the development text of its texts."""
    named = [{one.ref: _name(one) for one in (*request.at_snapshots, request)} for request, _ in trained]
    scores = [
        score
        for models, (_, texts) in zip(named, trained, strict=True)
        for score in score_requests(prepared, models, texts, ["development"])
    ]
    made = by_ref(driver.require(scores))
    found = []
    for request, texts in trained:
        models = {one.last_update: one.ref for one in (*request.at_snapshots, request)}
        perplexities = mean_perplexities(driver.ledger, list(models.values()), texts, made)
        update = best_milestone(dict(zip(models, perplexities, strict=True)))
        found.append(BestMilestone(update, models[update]))
    return found


def _name(request: TrainRequest) -> str:
    return f"{request.label} at update {request.last_update}"


def stopped_forest(forest: Ensemble, best: Mapping[str, BestMilestone]) -> Ensemble:
    """The forest of each domain's expert at its best milestone."""
    models = tuple((domain, best[domain].model) for domain, _ in forest.models)
    return Ensemble(STOPPED_FOREST, models, METHODS, (), forest.seed, forest.seed_share, shows_experts=True)
