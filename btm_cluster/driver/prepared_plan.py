"""A plan with its texts prepared: token blocks, tokenizer, the model's
configuration, and the founding domains.

Pure but for looking: at what a plan points to (file stamps, a pretrained model's files), and at texts in the
ledger. The driver, and `btm plan`, which must name the same artifacts without making them, share these
functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from btm_cluster.driver.text_requests import tokenize_requests, tokenizer_request
from btm_cluster.errors import TextError, UserError
from btm_cluster.forest import Forest, Foundation
from btm_cluster.identity import identity_of
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.pretrained import (
    pretrained_config,
    pretrained_model,
)
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import Plan
from btm_cluster.requests import (
    FindOverlap,
    Pretrained,
    Tokenize,
    TrainingText,
)

HELD_OUT = ("development", "test")


@dataclass(frozen=True)
class PreparedText:
    """A domain's or target's text once it is read: its identity, its counts and its token blocks by split."""

    name: str
    is_target: bool
    identity: str
    facts: Mapping[str, Any]
    skipped: Mapping[str, int]
    tokens: Mapping[str, tuple[Ref, ...]]


@dataclass(frozen=True)
class PreparedPlan:
    """A plan with its texts prepared: token blocks, tokenizer, and the model's configuration."""

    plan: Plan
    texts: tuple[PreparedText, ...]
    founders: tuple[tuple[str, str], ...]
    """Name and text identity of the domains that the seed learns from."""
    founding_texts: tuple[TrainingText, ...]
    """Their token blocks, by text identity, so that the order of domains in a plan changes nothing."""
    tokenizer: Ref
    model: Mapping[str, Any]
    pretrained: Pretrained | None

    @property
    def domains(self) -> tuple[PreparedText, ...]:
        return tuple(text for text in self.texts if not text.is_target)

    @property
    def founders_by_text(self) -> tuple[tuple[str, str], ...]:
        """The founding domains in the order of their texts, which is that of a DEMix's parts."""
        return tuple(sorted(self.founders, key=lambda founder: founder[1]))

    def foundation(self, seed: str) -> Foundation:
        """The foundation that version 0 freezes."""
        return Foundation(
            seed,
            self.tokenizer.identity,
            identity_of(self.model),
            self.plan.training.block_tokens,
            self.founders,
        )


def training_text(identity: str, tokens: Mapping[str, tuple[Ref, ...]]) -> TrainingText:
    """A text as training sees it, given its token blocks by split. Of a large text, one shard of development
    blocks will do."""
    return TrainingText(identity, tokens["train"], development=tokens.get("development", ())[:1])


def without_withdrawn(plan: Plan, forest: Forest | None) -> Plan:
    """The plan without the domains that were taken out of the forest: naming
    them still does not bring them back.

    Raises:
        UserError: that leaves none.
    """
    withdrawn = forest.withdrawn if forest is not None else ()
    kept = tuple(domain for domain in plan.domains if domain.name not in withdrawn)
    if not kept:
        raise UserError(
            "every domain of the plan was taken out of the forest",
            found=", ".join(withdrawn),
            remedy="name another domain, or bring one back with `btm forest remove DOMAIN --undo`",
        )
    return plan.model_copy(update={"domains": kept})


def text_of(read: Artifact) -> str:
    """The identity of the text that a source was read into."""
    (text,) = read.parts
    return text.identity


def check_distinct(plan: Plan, texts: Mapping[str, str]) -> None:
    """Refuses two domains of the same documents: they would be one expert under two names.

    Raises:
        TextError: naming both.
    """
    names: dict[str, str] = {}
    for domain in plan.domains:
        first = names.setdefault(texts[domain.name], domain.name)
        if first != domain.name:
            raise TextError(
                f"the domains {first!r} and {domain.name!r} have the same documents",
                found=f"text {texts[first][:12]} twice",
                expected="a text of its own for each domain",
                remedy="leave one of them out",
            )


def founders_of(plan: Plan, texts: Mapping[str, str], forest: Forest | None) -> tuple[tuple[str, str], ...]:
    """The founding domains: version 0's where there is one, else the plan's."""
    if forest is None:
        return tuple(sorted((domain.name, texts[domain.name]) for domain in plan.domains))
    return forest.foundation.domains


def prepared_from(
    plan: Plan,
    read_results: Mapping[str, Artifact],
    model: tuple[Mapping[str, Any], Pretrained | None],
    ledger: Ledger,
) -> PreparedPlan:
    """The prepared plan, once its texts are read: `read_results` are by text name.

    A plan need not name all founding domains again: the store has their texts.
    """
    identities = {name: text_of(read) for name, read in read_results.items()}
    check_distinct(plan, identities)
    founders = founders_of(plan, identities, ledger.log.version(0))
    tokenizer = tokenizer_request(plan, founders).ref
    facts = {text: ledger.get(Ref("text", text)).facts for text in identities.values()}
    found = {text: ledger.find(Ref("text", text)) for text in dict(founders).values() if text not in facts}
    # But for what was purged since.
    facts |= {text: artifact.facts for text, artifact in found.items() if artifact}

    def tokens_of(name: str, text: str) -> dict[str, tuple[Ref, ...]]:
        shards = tokenize_requests(name, text, facts[text], tokenizer, plan)
        return {split: tuple(request.ref for request in requests) for split, requests in shards.items()}

    targets = {target.name for target in plan.targets}
    texts = tuple(
        PreparedText(
            name,
            name in targets,
            text,
            facts[text],
            read_results[name].facts["skipped"],
            tokens_of(name, text),
        )
        for name, text in ((source.name, identities[source.name]) for source in plan.texts)
    )
    founding = tuple(
        training_text(text, tokens_of(name, text)) if text in facts else TrainingText(text, ())
        for name, text in sorted(founders, key=lambda f: f[1])
    )
    return PreparedPlan(plan, texts, founders, founding, tokenizer, *model)


def without_texts(
    plan: Plan, model: tuple[Mapping[str, Any], Pretrained | None], ledger: Ledger
) -> PreparedPlan:
    """A prepared plan before any of its texts is read: enough to tell its
    foundation in a store that has a forest."""
    return prepared_from(plan.model_copy(update={"domains": (), "targets": ()}), {}, model, ledger)


def stored_text(name: str, text: str, prepared: PreparedPlan, ledger: Ledger) -> PreparedText:
    """A domain's text that the store has, whether the plan names it or not."""
    facts = ledger.get(Ref("text", text)).facts
    shards = tokenize_requests(name, text, facts, prepared.tokenizer, prepared.plan)
    tokens = {split: tuple(request.ref for request in requests) for split, requests in shards.items()}
    return PreparedText(name, False, text, facts, {}, tokens)


def with_forests_texts(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> PreparedPlan:
    """With the texts of the forest's domains that the plan does not name, from
    the store: what is evaluated on."""
    named = {text.name for text in prepared.texts}
    others = [expert for expert in forest.experts if expert.domain not in named]
    stored = tuple(stored_text(expert.domain, expert.text, prepared, ledger) for expert in others)
    return replace(prepared, texts=(*prepared.texts, *stored))


def block_requests(prepared: PreparedPlan) -> list[Tokenize]:
    """Every shard of every text that is trained or evaluated on."""
    return [
        request
        for text in prepared.texts
        for split, requests in tokenize_requests(
            text.name, text.identity, text.facts, prepared.tokenizer, prepared.plan
        ).items()
        for request in requests
        if not text.is_target or split != "train"
    ]


def overlap_requests(texts: Sequence[PreparedText], trained_on: Sequence[PreparedText]) -> list[FindOverlap]:
    """Each text that is trained on against the test text of all `texts`."""
    tests = tuple(sorted(text.identity for text in texts if text.facts["splits"]["test"]["documents"]))
    return [FindOverlap(text.name, text.identity, tests) for text in trained_on]


def model_config(plan: Plan, vocabulary: int) -> tuple[Mapping[str, Any], Pretrained | None]:
    """The model's full configuration, and where it comes from if it is pretrained.

    Raises:
        UserError: it fits neither the plan nor its tokenizer, or has no such part as `branching` trains.
    """
    pretrained = None
    if plan.model.pretrained is not None:
        pretrained = pretrained_model(plan.model.pretrained)
        config = pretrained_config(pretrained, vocabulary, plan.training.block_tokens)
    else:
        config = full_config(plan.model, vocabulary, plan.training.block_tokens)
    trains_of(plan.branching, config)
    return config, pretrained
