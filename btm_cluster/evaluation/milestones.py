"""The Transformer-LM's best milestone: chosen by perplexity on the founding
domains' development text, never by test text.

A Transformer-LM that passes over little text many times gets worse before its end, and its finished model
alone is then an easy baseline.
"""

from collections.abc import Mapping

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.evaluation.rows import Milestones
from btm_cluster.evaluation.scoring import mean_perplexities, score_requests
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import ScoreRequest


def best_milestone(perplexities: Mapping[int, float]) -> int:
    """The update of the lowest perplexity; of equal ones the last."""
    return min(perplexities, key=lambda update: (perplexities[update], -update))


def milestone_scores(prepared: PreparedPlan, milestones: Mapping[int, Ref]) -> list[ScoreRequest]:
    """The scores that the choice takes. `milestones` are models by update."""
    models = {model: f"transformer-lm at update {update}" for update, model in milestones.items()}
    return score_requests(prepared, models, _judged_on(prepared), ["development"])


def choose_milestone(
    prepared: PreparedPlan, milestones: Mapping[int, Ref], ledger: Ledger, scores: Mapping[Ref, Artifact]
) -> Milestones | None:
    """The milestones with the best of them; None where there are none, or
    no development text to choose on."""
    domains = _judged_on(prepared)
    if not milestones or not domains:
        return None
    found = mean_perplexities(ledger, list(milestones.values()), domains, scores)
    perplexities = dict(zip(milestones, found, strict=True))
    return Milestones(perplexities, best_milestone(perplexities))


def _judged_on(prepared: PreparedPlan) -> list[PreparedText]:
    """The domains that the Transformer-LM learned from, as far as they have development text."""
    founders = {text for _, text in prepared.founders}
    return [
        domain for domain in prepared.domains if domain.identity in founders and domain.tokens["development"]
    ]
