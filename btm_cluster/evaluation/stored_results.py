"""Test perplexities of a model as far as the store has its scores. Makes none."""

from collections.abc import Mapping

import torch

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.equations.mixture import interval, perplexity, resampled_perplexity
from btm_cluster.evaluation.scoring import scored_split
from btm_cluster.evaluation.verdict import RESAMPLES
from btm_cluster.language_model.model_card import Result
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.scores import ScoreStack


def stored_results(prepared: PreparedPlan, models: Mapping[str, Ref], ledger: Ledger) -> tuple[Result, ...]:
    """A result for each text on which the first of the models was scored, with the others that were."""
    texts = [text for text in prepared.texts if text.tokens["test"]]
    refs = [score for text in texts for score in scored_split(tuple(models.values()), text, "test").scores]
    found = iter(ledger.find_all(refs))
    results = []
    for number, text in enumerate(texts):
        scores = {name: one for name in models if (one := next(found)) is not None}
        if next(iter(models)) in scores:
            results.append(_result(text, scores, ledger, number))
    return tuple(results)


def _result(text: PreparedText, scores: Mapping[str, Artifact], ledger: Ledger, random_seed: int) -> Result:
    stack = ScoreStack(ledger, list(scores.values()), text.tokens["test"])
    logp_SD, tokens_D = stack.sums(), stack.tokens()
    values_S = perplexity(logp_SD, tokens_D)
    resamples_SR = resampled_perplexity(logp_SD, tokens_D, RESAMPLES, random_seed)
    cells = {
        name: (float(value), *interval(resamples_R))
        for name, value, resamples_R in zip(scores, values_S, resamples_SR, strict=True)
    }
    return Result(text.name, int(torch.sum(tokens_D)), cells)
