"""Scores of models on texts: the requests, by pair, and several models' scores of one split together."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import HELD_OUT, PreparedPlan, PreparedText
from btm_cluster.driver.recipes import score_request
from btm_cluster.equations.perplexity import TOKENS, perplexity
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.requests import Resources, ScoredSplit, ScoreRequest

ONE_CPU = Resources(1, 0.0, 1, 1, "float32", False)


def score_requests(
    prepared: PreparedPlan,
    models: Mapping[Ref, str],
    texts: Sequence[PreparedText],
    splits: Sequence[str] = HELD_OUT,
) -> list[ScoreRequest]:
    """Each model on each text, as far as a text has the split. `models` have the names that they are shown by."""
    return [
        score_request(prepared, model, text, split, name)
        for model, name in models.items()
        for text in texts
        for split in splits
        if text.tokens[split]
    ]


def score_models(
    prepared: PreparedPlan,
    models: Mapping[Ref, str],
    texts: Sequence[PreparedText],
    driver: Driver,
    splits: Sequence[str] = HELD_OUT,
) -> dict[Ref, Artifact]:
    """Has each model scored on each text, all at once, so that each model is loaded once. The scores."""
    return by_ref(driver.require(score_requests(prepared, models, texts, splits)))


def by_ref(artifacts: Iterable[Artifact]) -> dict[Ref, Artifact]:
    """Artifacts that were just made or found, so that nobody asks the store for them again."""
    return {artifact.ref: artifact for artifact in artifacts}


def scored_split(models: Sequence[Ref], text: PreparedText, split: str) -> ScoredSplit:
    """Several models' scores of one split of one text, made or still to be made."""
    if not text.tokens[split]:
        return ScoredSplit((), ())
    return ScoredSplit(tuple(_score_ref(model, text.tokens[split]) for model in models), text.tokens[split])


@lru_cache(maxsize=2**16)
def _score_ref(model: Ref, tokens: tuple[Ref, ...]) -> Ref:
    """Resources are no part of a name; tables ask for each one many times."""
    return ScoreRequest("", "", model, tokens, ONE_CPU).ref


def mean_perplexities(
    ledger: Ledger,
    models: Sequence[Ref],
    texts: Sequence[PreparedText],
    known: Mapping[Ref, Artifact] | None = None,
) -> list[float]:
    """Each model's perplexity on development text, mean over texts."""
    totals = [0.0] * len(models)
    for text in texts:
        stack = stack_of(ledger, models, text, "development", known)
        perplexities = perplexity(stack.sums()[:, TOKENS].sum(1), stack.sizes()[TOKENS].sum())
        totals = [total + one for total, one in zip(totals, perplexities.tolist(), strict=True)]
    return [total / len(texts) for total in totals]


def stack_of(
    ledger: Ledger,
    models: Sequence[Ref],
    text: PreparedText,
    split: str,
    known: Mapping[Ref, Artifact] | None = None,
) -> ScoreStack:
    """The scores of several models on one split of one text: among those that
    are known, or read from the store."""
    scored = scored_split(models, text, split)
    if known is None:
        return ScoreStack.of(ledger, scored)
    return ScoreStack(ledger, [known[ref] for ref in scored.scores], scored.tokens)
