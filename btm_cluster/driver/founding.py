"""Whether a plan fits the forest of its store, and in which of the plan's fields the two differ.

Version 0 holds hashes of what a forest was founded on. What they are hashes of stands in the manifests of
seed, tokenizer and experts, so that a refusal can name causes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.recipes import seed_request
from btm_cluster.driver.text_requests import tokenizer_request
from btm_cluster.errors import FoundationError, UserError
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ledger, Ref

_LONGEST_SHOWN = 200
PARTS = ("tokenizer", "model", "block_tokens", "seed")


def check_fits(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> None:
    """Refuses a plan whose foundation is not the forest's, or that gives a
    name of the forest to another text.

    Raises:
        UserError: naming every field that differs, or the text.
    """
    check_foundation(prepared, forest, ledger)
    check_texts(prepared, forest, ledger)


def check_texts(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> None:
    """Refuses another text by the name of a founding domain or of an expert's, and an expert's text by another
    name.

    Raises:
        UserError: naming the domain, and in what the two texts differ.
    """
    named = {text.name: text for text in prepared.texts}
    founding, experts = (
        dict(forest.foundation.domains),
        {expert.domain: expert.text for expert in forest.experts},
    )
    for name, text in (founding | experts).items():
        if name not in named:
            continue
        if named[name].is_target and name in experts:
            raise UserError(
                f"the target {name!r} has the name of a domain of the forest",
                found=f"an expert of that name in forest version {forest.version}",
                expected="a name of its own for each text",
                remedy="rename the target",
            )
        if not named[name].is_target and named[name].identity != text:
            changes = changes_of_text(text, named[name].identity, ledger)
            raise _another_text(name, name in founding, forest.version, changes)
    names = {text: name for name, text in experts.items()}
    for domain in prepared.domains:
        if domain.name not in experts and (first := names.get(domain.identity)):
            raise UserError(
                f"the domain {domain.name!r} has the same documents as {first!r}",
                found=f"an expert of these documents in forest version {forest.version}",
                expected="documents of its own for each domain",
                remedy=f"call it {first!r}, or leave it out; a name is not changed later",
            )


def _another_text(name: str, is_founding: bool, version: int, changes: str) -> UserError:
    if is_founding:
        return FoundationError(
            f"the forest in this store was founded on another text of {name!r}",
            found=changes,
            expected="the documents and splits that the seed learned from",
            remedy="restore them, give the domain another name to add it, or take another `store`",
        )
    return UserError(
        f"the domain {name!r} already stands in forest version {version}",
        found=changes,
        expected="the documents and splits on which its expert was trained",
        remedy="give the new text a name of its own, or restore the old one",
    )


def changes_of_text(old: str, new: str, ledger: Ledger) -> str:
    """In what two texts differ: how they were read, where from, and how many documents they have."""
    read_results = [_newest_read_result(text, ledger) for text in (old, new)]
    found = [ledger.find(Ref("text", text)) for text in (old, new)]
    changes: list[str] = []
    if read_results[0] and read_results[1]:
        recipes = read_results[0].recipe, read_results[1].recipe
        changes += _changes("reading", recipes[0]["reading"], recipes[1]["reading"])
        changes += _changes("its source", recipes[0]["source"], recipes[1]["source"])
        if not changes:
            changes.append("other documents in its files")
    if found[0] and found[1]:
        counts = [
            [f"{of['documents']:,} {split}" for split, of in t.facts["splits"].items()] for t in found if t
        ]
        changes.append(f"documents: {', '.join(counts[0])} → {', '.join(counts[1])}")
    return "; ".join(changes) or f"text {new[:12]} instead of {old[:12]}"


def _newest_read_result(text: str, ledger: Ledger) -> Artifact | None:
    """The newest result of reading a source into this text."""
    ref = Ref("text", text)
    sources = ledger.list_artifacts("source")
    # One with inputs was dealt.
    read_results = [one for one in sources if ref in one.parts and not one.inputs]
    return max(read_results, key=lambda read_result: str(read_result.note.get("created")), default=None)


def check_foundation(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> None:
    """Refuses a plan whose foundation is not the forest's.

    Raises:
        FoundationError: naming every field that differs; every part, where a manifest is gone.
    """
    wanted = prepared.foundation(seed_request(prepared).ref.identity)
    differing = [part for part in PARTS if getattr(forest.foundation, part) != getattr(wanted, part)]
    causes = (
        list(_causes(prepared, forest, ledger))
        if differing
        else list(_experts_span(prepared, forest, ledger))
    )
    if differing or causes:
        raise FoundationError(
            "the plan changes what this store's forest was founded on",
            found="; ".join(causes) or "another " + ", ".join(differing),
            expected="what version 0 was founded on" + (", left of each arrow" if causes else ""),
            remedy="restore it, or take another `store` for this plan",
        )


def _causes(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> Iterator[str]:
    """Fields of the plan, as they were and as they are, but for what follows from
    others: nothing where a manifest is gone."""
    seed = ledger.find(Ref("model", forest.foundation.seed))
    tokenizer = ledger.find(Ref("tokenizer", forest.foundation.tokenizer))
    if seed is None or tokenizer is None:
        return
    asked = tokenizer_request(prepared.plan, prepared.founders)
    if asked.ref != tokenizer.ref:
        yield from _tokenizer_causes(tokenizer.recipe, _plain(asked.recipe))
    old, new = seed.recipe, _plain(seed_request(prepared).recipe)
    yield from _changes("training", old["training"], new["training"])
    if old["pretrained"] != new["pretrained"]:
        yield _pretrained_cause(seed, prepared)
        return
    block_tokens = old["training"]["block_tokens"], new["training"]["block_tokens"]
    named = "model.config" if prepared.plan.model.config is not None else "model"
    follows = {"vocab_size"} if asked.ref != tokenizer.ref else set()
    follows |= {
        name for name, value in old["model"].items() if (value, new["model"].get(name)) == block_tokens
    }
    if old["model"].get("model_type") != new["model"].get("model_type"):  # whose fields are others
        follows |= {*old["model"], *new["model"]} - {"model_type"}
    yield from _changes(named, old["model"], new["model"], follows)
    spans = old["last_update"], new["last_update"]
    if spans[0] != spans[1] and old["training"]["updates"] == new["training"]["updates"]:
        yield "training.seed_share: {:g} → {:g}".format(
            *(span / old["training"]["updates"] for span in spans)
        )


def _tokenizer_causes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    earlier = "tokenizer.pretrained: brought in by an earlier release, which read blocks otherwise"
    if "train" in old and "train" in new:
        yield from _changes("tokenizer.train", old["train"], new["train"])
    elif "train" in old or "train" in new:
        kinds = ("train" if "train" in old else "pretrained", "train" if "train" in new else "pretrained")
        yield "tokenizer: `{}` → `{}`".format(*kinds)
    elif "first_token" not in old:
        yield earlier
    elif old["pretrained"] != new["pretrained"]:
        yield "tokenizer.pretrained: other files than those of version 0"
    else:
        # Whether the first token stands between documents follows from which token it is.
        yield from list(_changes("tokenizer", old, new, {"begins_documents"})) or [earlier]


def _pretrained_cause(seed: Artifact, prepared: PreparedPlan) -> str:
    if prepared.pretrained is None:
        return f"model: `pretrained: {seed.note.get('from')}` → a model trained from the start"
    if seed.recipe["pretrained"] is None:
        return f"model: a model trained from the start → `pretrained: {prepared.pretrained.source}`"
    source = seed.note.get("from")
    if source == prepared.pretrained.source:
        return f"model.pretrained: other files in {source} than those of version 0"
    return f"model.pretrained: {source} → {prepared.pretrained.source}"


def _experts_span(prepared: PreparedPlan, forest: Forest, ledger: Ledger) -> Iterator[str]:
    """A pretrained seed is the same whatever `seed_share` says, and its experts are
    not: theirs must be that of the plan."""
    if prepared.pretrained is None or not forest.experts:
        return
    expert = ledger.find(Ref("model", forest.experts[0].identity))
    training = prepared.plan.training
    if expert is not None and expert.recipe["first_update"] != training.seed_updates:
        share = expert.recipe["first_update"] / training.updates
        yield (
            f"training.seed_share: {share:g} → {training.seed_share:g} (where the model is pretrained and "
            "`seed_share` is not written, it is 0)"
        )


def _changes(
    section: str, old: Mapping[str, Any], new: Mapping[str, Any], follows: set[str] | None = None
) -> Iterator[str]:
    """Differences between two sections of plain values, but for names that follow from elsewhere."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name not in (follows or ()):
            yield f"{section}.{name}: {_shown(old, name)} → {_shown(new, name)}"


def _shown(section: Mapping[str, Any], name: str) -> str:
    shown = json.dumps(section[name], ensure_ascii=False) if name in section else "not given"
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """As a manifest holds it."""
    plain: dict[str, Any] = json.loads(json.dumps(recipe))
    return plain
