"""Whether new experts make a forest worse on what it knew before, and what they bring on their own text.

Perplexities of the ensemble on development text, as the plan mixes it (by the calibrated posterior where that
is a gate): fitted on one half of the blocks and measured on the other, both ways, since a mixture that is
fitted and measured on the same text only gains by another expert.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText, stored_text
from btm_cluster.driver.text_requests import tokenize_requests
from btm_cluster.evaluation.scoring import score_models, stack_of
from btm_cluster.evaluation.texts import targets_seen_in
from btm_cluster.forest import Expert, Forest
from btm_cluster.ledger import Ref
from btm_cluster.ledger.records import Held, branch_point_identity
from btm_cluster.mixing.fitting import cross_fitted_perplexity, each_in_one_thread


@dataclass(frozen=True)
class Gain:
    """The ensemble's development perplexity on a new domain, without its expert and with it."""

    before: float | None
    """None for the first experts of a forest."""
    after: float


@dataclass(frozen=True)
class Judgement:
    """Which experts may be merged, which are held back, and what the former bring."""

    accepted: tuple[Expert, ...]
    held: Mapping[str, Held]
    gains: Mapping[str, Gain]


def judge(prepared: PreparedPlan, forest: Forest, experts: Sequence[Expert], driver: Driver) -> Judgement:
    """Takes all experts if the forest with all of them is no worse than the plan
    allows; else one after the other, by name."""
    old, new, limit = tuple(forest.experts), tuple(experts), prepared.plan.expansion.accept_if
    own = [text for text in prepared.domains if text.name in {expert.domain for expert in new}]
    known: list[PreparedText] = []
    if limit is not None and old and new:
        seen = targets_seen_in(prepared, {expert.domain: expert.text for expert in new}, driver)
        targets = [text for text in prepared.texts if text.is_target and text.name not in seen]
        known = [
            *_texts_of(prepared, forest, driver),
            *(text for text in targets if text.tokens["development"]),
        ]
    perplexity = _ensemble_perplexity(prepared, (*old, *new), [*known, *own], driver)
    accepted, held = new, dict[str, Held]()
    if limit is not None and known:
        allowed, before = limit.development_perplexity_rise_at_most, _mean(perplexity, old, known)
        if _mean(perplexity, old + new, known) > before * (1 + allowed):
            accepted = ()
            for expert in sorted(new, key=lambda one: one.domain):  # the same in whatever order they came
                rise = _mean(perplexity, (*old, *accepted, expert), known) / before - 1
                if rise > allowed:
                    held[expert.domain] = _held(expert, forest, rise, before, allowed)
                else:
                    accepted = (*accepted, expert)

    def gain(domain: str) -> Gain:
        return Gain(perplexity(old, domain) if old else None, perplexity((*old, *accepted), domain))

    domains = [expert.domain for expert in accepted]
    gains = dict(zip(domains, each_in_one_thread(gain, domains), strict=True))
    return Judgement(accepted, held, gains)


Perplexity: TypeAlias = Callable[[tuple[Expert, ...], str], float]
"""Perplexity of the ensemble of some experts on the text of a name."""


def _ensemble_perplexity(
    prepared: PreparedPlan, experts: Sequence[Expert], texts: Sequence[PreparedText], driver: Driver
) -> Perplexity:
    """Scores every text under every expert, and answers, once, for any of them."""
    models = {Ref("model", expert.identity): expert.domain for expert in experts}
    scores = score_models(prepared, models, texts, driver, ["development"])
    by_name = {text.name: text for text in texts}

    @cache
    def perplexity(chosen: tuple[Expert, ...], text: str) -> float:
        models, merging = [Ref("model", expert.identity) for expert in chosen], prepared.plan.merging
        stack = stack_of(driver.ledger, models, by_name[text], "development", scores)
        return cross_fitted_perplexity(*stack.take(0, merging.development_blocks), merging)

    return perplexity


def _mean(perplexity: Perplexity, experts: tuple[Expert, ...], texts: Sequence[PreparedText]) -> float:
    return sum(
        each_in_one_thread(lambda text: perplexity(experts, text), [text.name for text in texts])
    ) / len(texts)


def _texts_of(prepared: PreparedPlan, forest: Forest, driver: Driver) -> list[PreparedText]:
    """The texts that a forest's experts were trained on: the store has them, whatever the plan names."""
    texts = [stored_text(expert.domain, expert.text, prepared, driver.ledger) for expert in forest.experts]
    requests = [
        request
        for text in texts
        for request in tokenize_requests(
            text.name, text.identity, text.facts, prepared.tokenizer, prepared.plan
        )["development"]
    ]
    driver.require(requests)
    return texts


def _held(expert: Expert, forest: Forest, rise: float, before: float, allowed: float) -> Held:
    reason = (
        f"with it, the mean development perplexity of forest version {forest.version} goes from {before:.2f} "
        f"to {before * (1 + rise):.2f} ({rise:+.2%}); the plan allows {allowed:+.2%}"
    )
    point = branch_point_identity(expert.domain, expert.text, forest.foundation.seed)
    return Held(point, expert.identity, forest.version, rise, reason)
