"""Mixtures of a forest's domains for a target, as trainings that go on from the seed. Scores nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from btm_cluster.algorithm import Grown
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.prepared_plan import PreparedText
    from btm_cluster.ledger import Artifact, Ref
    from btm_cluster.requests import TrainRequest

MOST_PARTS = 64
"""Largest number of equal parts into which an update is cut, where a domain's blocks can be."""
SEED, SOUP = "seed", "learned soup"
UNIFORM, LEARNED, LARGEST, POSTERIOR, FITTED = (
    "uniform mixture",
    "mixture by the learned soup",
    "largest weight alone",
    "mixture by the posterior",
    "mixture by the fitted prior",
)


def weights_for(
    grown: "Grown", text: "PreparedText", soup: "Artifact", driver: "Driver"
) -> dict[str, dict[str, float]]:
    """The weights of a target's learned soup and of its priors, by domain, and by `SEED` where that has one."""
    from btm_cluster.evaluation.evaluate import forest_ensemble
    from btm_cluster.evaluation.fitting import scores_for, weight_requests

    experts = forest_ensemble(grown.prepared, grown.forest)
    fits = weight_requests(grown.prepared, experts, "ema", text)
    prior = driver.require([*scores_for(grown.prepared, experts, text), *fits])[-1].facts["weights"]
    names = {one.identity: one.domain for one in grown.forest.experts}

    def named(by_model: Mapping[str, float]) -> dict[str, float]:
        return {names.get(model, SEED): weight for model, weight in by_model.items() if weight}

    return {
        SOUP: named(soup.facts["weights"]),
        POSTERIOR: named(prior["ema"]),
        FITTED: named(prior["fitted"]),
    }


def mixtures(weights: Mapping[str, Mapping[str, float]], domains: Sequence[str]) -> dict[str, list[float]]:
    """The proportions of each mixture, in order of the domains, given what `weights_for` returns. They sum to one.

    A learned soup is the seed and a weighted sum of the experts' steps away from it. The seed's weight says how
    short the sum is, and no proportion. Where the seed has all of it, proportions are equal.
    """
    uniform = [1 / len(domains)] * len(domains)
    learned = [weights[SOUP].get(domain, 0.0) for domain in domains]
    total = math.fsum(learned)
    largest = max(range(len(domains)), key=learned.__getitem__)
    return {
        UNIFORM: uniform,
        LEARNED: [weight / total for weight in learned] if total else uniform,
        LARGEST: [float(i == largest) for i in range(len(domains))] if total else uniform,
        **{prior: [weights[prior].get(domain, 0.0) for domain in domains] for prior in (POSTERIOR, FITTED)},
    }


def mixture_request(grown: "Grown", label: str, proportions: Sequence[float]) -> "TrainRequest":
    """The Transformer-LM's training from the seed on, with so much of each of the forest's domains."""
    from btm_cluster.driver.recipes import train_request
    from btm_cluster.requests import Start, TrainingText

    prepared, training = grown.prepared, grown.prepared.plan.training
    by_name = {domain.name: domain for domain in prepared.domains}
    of_each, blocks = parts(len(by_name), training.blocks_per_domain_update)
    counts = largest_remainder(proportions, of_each * len(by_name))
    # A part's order of blocks is drawn by the name of its split.
    mixed = tuple(
        TrainingText(by_name[domain].identity, by_name[domain].tokens["train"], f"part {number} of {count}")
        for domain, count in zip(grown.forest.domains, counts, strict=True)
        for number in range(count)
    )
    span = (training.seed_updates, training.updates)
    start = Start(seed_of(grown), keep_optimizer=True)
    request = train_request(prepared, label, "transformer-lm", mixed, span, start)
    return replace(request, training=training.model_copy(update={"blocks_per_domain_update": blocks}))


def parts(domains: int, blocks: int) -> tuple[int, int]:
    """Parts of each domain in the uniform mixture, and blocks of each part, given those of each domain."""
    of_each_part = math.gcd(blocks, max(1, domains * blocks // MOST_PARTS))
    return blocks // of_each_part, of_each_part


def largest_remainder(proportions: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this total, as near to the proportions as rounding each down, and those up that lose
    most, gets."""
    exact = [share * total / math.fsum(proportions) for share in proportions]
    counts = [math.floor(one) for one in exact]
    by_loss = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_loss[: total - sum(counts)]:
        counts[i] += 1
    return counts


def shares_of(grown: "Grown", request: "TrainRequest") -> dict[str, float]:
    """The share of each domain in a training's texts."""
    names = {domain.identity: domain.name for domain in grown.prepared.domains}
    trained = [names[text.text] for text in request.texts]
    return {name: trained.count(name) / len(trained) for name in dict.fromkeys(trained)}


def seed_of(grown: "Grown") -> "Ref":
    from btm_cluster.ledger import Ref

    return Ref("model", grown.forest.foundation.seed)
