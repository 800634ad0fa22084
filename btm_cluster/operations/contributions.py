"""`btm forest contributions`: which domain earns its keep, by leaving each
expert out, from cached scores alone.

For every text that all experts of the forest were scored on: the calibrated ensemble is fitted on its
development text, and its perplexity on test text is taken with all experts and without each one of them. Asks
nobody for anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from btm_cluster.equations.calibration import DEFAULT_EVIDENCE_WEIGHT, calibrate
from btm_cluster.equations.posterior import Posterior, uniform_prior
from btm_cluster.errors import UserError
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.parts import measure_parts
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.plan import MergingPlan


@dataclass(frozen=True)
class Contribution:
    """One text: the ensemble's test perplexity, and that without each expert, by domain."""

    text: str
    is_domain: bool
    perplexity: float
    without: Mapping[str, float]

    def rise(self, domain: str) -> float:
        """By how much perplexity rises, relatively, where a domain's expert is left out."""
        return self.without[domain] / self.perplexity - 1


@dataclass(frozen=True)
class Contributions:
    """All texts."""

    version: int
    domains: tuple[str, ...]
    texts: tuple[Contribution, ...]

    def mean_rise(self, domain: str) -> float:
        """Over all texts."""
        return sum(text.rise(domain) for text in self.texts) / len(self.texts)

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "version": self.version,
            "domains": list(self.domains),
            "texts": [asdict(text) for text in self.texts],
        }


@dataclass(frozen=True)
class _Scored:
    """Scores of every expert, in the forest's order, on one split of one text."""

    scores: Sequence[Artifact]
    tokens: tuple[Ref, ...]


def contributions(ledger: Ledger) -> Contributions:
    """The worth of each expert of the newest version on every text that they were all scored on.

    Raises:
        UserError: there is no forest of two experts, or no such text.
    """
    forest = ledger.log.newest()
    if forest is None or len(forest.experts) < 2:
        raise UserError(
            f"there are no two experts in {ledger.storage.location}",
            expected="one to leave out, and another",
            remedy="check --store; `btm run` grows a forest, `btm expand` adds to it",
        )
    scored = _scored(ledger, forest)
    names = _names(ledger, forest)
    domains = {expert.text for expert in forest.experts}
    found = [
        _contribution(ledger, forest, names.get(text, text[:12]), text in domains, splits)
        for text, splits in scored.items()
        if "test" in splits
    ]
    if not found:
        raise UserError(
            f"no text was scored under every expert of forest version {forest.version}",
            remedy="`btm evaluate PLAN` scores them on all texts of the plan and the forest",
        )
    ordered = sorted(found, key=lambda one: (not one.is_domain, one.text))
    return Contributions(forest.version, forest.domains, tuple(ordered))


def _scored(ledger: Ledger, forest: Forest) -> dict[str, dict[str, _Scored]]:
    """Token blocks that all experts were scored on, by text identity and split."""
    experts = [Ref("model", expert.identity) for expert in forest.experts]
    tokens = {artifact.ref: artifact for artifact in ledger.list_artifacts("tokens")}
    by_tokens: dict[tuple[Ref, ...], dict[Ref, Artifact]] = {}
    for scores in ledger.list_artifacts("scores"):
        (model,) = scores.inputs["model"]
        if model in experts:
            by_tokens.setdefault(scores.inputs["tokens"], {})[model] = scores
    found: dict[str, dict[str, _Scored]] = {}
    for shards, by_model in by_tokens.items():
        if len(by_model) == len(experts) and all(shard in tokens for shard in shards):
            (text,), split = tokens[shards[0]].inputs["text"], tokens[shards[0]].recipe["split"]
            found.setdefault(text.identity, {})[split] = _Scored(
                [by_model[model] for model in experts], shards
            )
    return found


def _names(ledger: Ledger, forest: Forest) -> dict[str, str]:
    """Names of texts by identity: as they were called when they were read, and
    domains as the forest calls them."""
    sources = sorted(ledger.list_artifacts("source"), key=lambda source: str(source.note.get("created")))
    named = {
        text.identity: str(one.note["name"]) for one in sources if "name" in one.note for text in one.parts
    }
    return named | {expert.text: expert.domain for expert in forest.experts}


def _contribution(
    ledger: Ledger, forest: Forest, name: str, is_domain: bool, splits: Mapping[str, _Scored]
) -> Contribution:
    test = ScoreStack(ledger, splits["test"].scores, splits["test"].tokens)
    parts = measure_parts(test, *_fit(ledger, splits.get("development"), len(forest.experts)))
    without = dict(zip(forest.domains, parts.without, strict=True))
    return Contribution(name, is_domain, parts.perplexity, without)


def _fit(ledger: Ledger, development: _Scored | None, experts: int) -> tuple[torch.Tensor, Posterior]:
    """Prior and evidence weight, as a plan's defaults fit them: the store does not know the plan."""
    merging = MergingPlan()
    form = Posterior("calibrated", merging.window_tokens, merging.discount, DEFAULT_EVIDENCE_WEIGHT)
    if development is None:
        return uniform_prior(torch.zeros(experts, 1, 1, dtype=torch.float64)), form
    stack = ScoreStack(ledger, development.scores, development.tokens)
    return calibrate(*stack.take(0, merging.development_blocks), form)
