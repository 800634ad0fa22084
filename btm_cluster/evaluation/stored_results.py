"""Test perplexities and bits per byte of a model as far as the store has its scores. Makes none."""

from collections.abc import Mapping

from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.equations.perplexity import TOKENS
from btm_cluster.evaluation.scoring import scored_split
from btm_cluster.evaluation.verdict import SplitResult, cell, measure
from btm_cluster.language_model.model_card import Figures, Result
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
    sizes_UD = stack.sizes()
    result = SplitResult(
        text.name, text.is_target, "test", dict(zip(scores, stack.sums(), strict=True)), sizes_UD
    )
    cells = {name: cell(one) for name, one in measure(result, random_seed).items()}
    figures = {name: Figures(one.perplexity, one.interval, one.bits_per_byte) for name, one in cells.items()}
    return Result(text.name, int(sizes_UD[TOKENS].sum()), figures)
