"""Which artifacts need which: the graph that verifying, collecting and purging walk. Reads no store."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from btm_cluster.ledger import Artifact, Ref, artifact_key, known_form
from btm_cluster.requests import way_of

MIXED = ("fit-for-all", "gate", "mixture")
"""What is made of scores; the others of the first too."""
KINDS = ("text", "tokenizer", "model", "training", "tokens", "source", "overlap", "scores", "soup", *MIXED)
"""Every kind of artifact, each after those that it is made from."""


def needs_of(kind: str, recipe: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Iterator[Ref]:
    """What an artifact of a kind, recipe and facts is made from."""
    if kind == "model":
        start = recipe.get("start") or {}
        parents = recipe.get("average") or start.get("parents") or ()
        yield from (Ref("model", parent["identity"]) for parent in parents)
        # A study may train on a part of a text: `<text>/development/…`.
        yield from (Ref("text", text.partition("/")[0]) for text in recipe.get("texts", ()))
        if "demix" in recipe:  # a part, and the DEMix of which it is one: neither is of use alone
            yield Ref("model", recipe["demix"])
        yield from (Ref("model", part) for part in (facts or {}).get("parts", ()))
        if "tokenizer" in recipe:
            yield Ref("tokenizer", recipe["tokenizer"])
    elif kind == "scores":
        yield Ref("model", recipe["model"])
        yield from (Ref("tokens", tokens) for tokens in recipe["tokens"])
    elif kind in MIXED:
        yield from (Ref("scores", scores) for split in recipe["scores"] for scores in split)
        yield from (Ref("fit-for-all", fit) for fit in recipe.get("for_all", {}).values())
    elif kind == "soup":
        yield from (Ref("model", model) for model in recipe["models"])
        yield from (Ref("tokens", tokens) for tokens in recipe["tokens"])
    elif kind == "tokens":
        yield Ref("text", recipe["text"])
        yield Ref("tokenizer", recipe["tokenizer"])
    elif kind == "overlap":
        yield from (Ref("text", text) for text in (recipe["train"], *recipe["tests"]))
    elif kind == "source":
        yield Ref("text", (facts or {})["text"])


def needs(artifact: Artifact) -> list[Ref]:
    """What an artifact is made from, and is of no use without."""
    with known_form(artifact_key(artifact.ref)):
        return list(needs_of(artifact.kind, artifact.recipe, artifact.facts))


def reached(roots: Iterable[Ref], artifacts: Mapping[Ref, Artifact]) -> set[Ref]:
    """The roots, what they need, the scores and baselines of what is kept, and what is made of kept texts and models alone."""
    kept: set[Ref] = set()

    def keep(ref: Ref) -> None:
        waiting = [ref]  # no recursion: a line of descent may be longer than the stack
        while waiting:
            one = waiting.pop()
            if one not in kept and one in artifacts:
                kept.add(one)
                waiting += needs(artifacts[one])

    for root in roots:
        keep(root)
    for ref, artifact in artifacts.items():
        passed = [Ref("model", seed) for seed in artifact.facts.get("passed", ())]  # by a Transformer-LM
        if any(seed in kept for seed in passed):
            keep(ref)
    rivals = {_trained_alike(artifacts[ref].recipe) for ref in kept if ref.kind == "model"}
    for ref, artifact in artifacts.items():
        if artifact.recipe.get("is_demix") and _trained_alike(artifact.recipe) in rivals:
            keep(ref)
    for ref, artifact in artifacts.items():
        if ref.kind == "scores" and any(need in kept for need in needs(artifact) if need.kind == "model"):
            keep(ref)
    for kind in ("tokens", "source", "overlap", "soup", *MIXED):
        for ref, artifact in artifacts.items():
            if ref.kind == kind and all(need in kept for need in needs(artifact)):
                keep(ref)
    return kept


def _trained_alike(recipe: Mapping[str, Any]) -> str:
    """The same for a seed, the Transformer-LM that passes it, and the DEMix that is their rival."""
    return way_of({name: value for name, value in recipe.items() if name != "is_demix"})
