"""Which domain a text is of, as `btm score` tells it, for many callers."""

import asyncio
import threading
from collections.abc import Sequence

from btm_cluster.errors import UserError
from btm_cluster.language_model.document_scores import DocumentScorer, NamedText, Score, Sums
from btm_cluster.language_model.ensemble_scoring import TextScores
from btm_cluster.serving.completions import DomainsOfText, DomainsRequest
from btm_cluster.serving.engine_thread import SCORED_AT_ONCE
from btm_cluster.serving.forest import ENSEMBLE, LoadedForest, Served
from btm_cluster.serving.settings import ServingSettings

MOST_CHARACTERS = 1_000_000
"""Most characters of all texts of a call: while the tokenizer reads a text, nobody is answered."""


async def domains_of(
    forest: LoadedForest, body: DomainsRequest, settings: ServingSettings
) -> list[DomainsOfText]:
    """The domain posterior of each text. The scorer waits in a thread of its own, and ends with the call.

    Raises:
        UserError: too many texts, or too long ones.
    """
    given = [body.input] if isinstance(body.input, str) else body.input
    _check(given, settings)
    served, has_gone = await forest.model(ENSEMBLE), threading.Event()
    score = _score_in_portions(served, forest.mixture.block_tokens, settings, has_gone)
    names, domains = list(served.names), forest.mixture.domains
    places = [names.index(domain) for domain in domains]
    scorer = DocumentScorer(score, forest.tokenizer, forest.mixture.block_tokens, names, places)
    named = [NamedText("input", number, text) for number, text in enumerate(given)]
    try:
        found = await asyncio.to_thread(lambda: list(scorer.score(named)))
    finally:
        has_gone.set()
    return [_answer(text.number, sums, names, domains) for text, sums in found]


def _check(given: Sequence[str], settings: ServingSettings) -> None:
    if len(given) > settings.prompts:
        raise UserError("too many texts", found=str(len(given)), expected=f"at most {settings.prompts}")
    characters = sum(map(len, given))
    if characters > MOST_CHARACTERS:
        raise UserError(
            "the text is too long",
            found=f"{characters:,} characters",
            expected=f"at most {MOST_CHARACTERS:,} in one call",
            remedy="send parts of it; `btm score` reads files of any size",
        )


def _score_in_portions(
    served: Served, block_tokens: int, settings: ServingSettings, has_gone: threading.Event
) -> Score:
    """For a thread: scores no more blocks at once than may wait, so that a long text alone is not too many."""
    loop = asyncio.get_running_loop()
    portion = max(1, min(settings.waiting, SCORED_AT_ONCE // block_tokens))

    def score(texts: Sequence[Sequence[int]]) -> list[TextScores]:
        found: list[TextScores] = []
        for start in range(0, len(texts), portion):
            if has_gone.is_set():
                raise TimeoutError
            part = served.engine.score(texts[start : start + portion], served.gate)
            found += asyncio.run_coroutine_threadsafe(part, loop).result(settings.timeout_seconds)
        return found

    return score


def _answer(number: int, sums: Sums, names: Sequence[str], domains: Sequence[str]) -> DomainsOfText:
    logp = dict(zip((*names, ENSEMBLE), sums.logp.tolist(), strict=True))
    return DomainsOfText(
        index=number,
        domains=dict(zip(domains, sums.posterior.tolist(), strict=True)),
        tokens=sums.tokens,
        nats_per_token={name: -value / sums.tokens for name, value in logp.items()},
    )
