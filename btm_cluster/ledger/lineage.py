"""The graph of artifacts, each with what it is made from: the walks that verifying,
collecting and purging take. Reads no store."""

from collections.abc import Collection, Iterable, Mapping

from btm_cluster.ledger import Artifact, Ref
from btm_cluster.ledger.records import BranchPoint

MUST_BE_REACHED = ("text", "tokenizer", "model")
"""Kinds that are kept only where something needs them. All others are kept with what they are made from."""
_OF_ONE_TEXT = ("expert", "demix-part")
"""Roles of models that a domain has to itself."""


def reached(roots: Iterable[Ref], artifacts: Mapping[Ref, Artifact]) -> set[Ref]:
    """The roots, what they need, the scores of models among these, and what is made of all that alone."""
    kept: set[Ref] = set()

    def keep(ref: Ref) -> None:
        waiting = [ref]  # no recursion: a line of descent may be longer than the stack
        while waiting:
            one = waiting.pop()
            if one not in kept and one in artifacts:
                kept.add(one)
                waiting += artifacts[one].needs

    for root in roots:
        keep(root)
    for ref, artifact in artifacts.items():
        if ref.kind == "scores" and not kept.isdisjoint(artifact.inputs["model"]):
            keep(ref)
    for ref in in_order(artifacts):
        needs = artifacts[ref].needs
        if ref.kind not in MUST_BE_REACHED and needs and kept.issuperset(needs):
            kept.add(ref)
    return kept


def lost(named: Mapping[Ref, str], kept: Iterable[Ref], artifacts: Mapping[Ref, Artifact]) -> dict[Ref, str]:
    """Artifacts that are named, or needed by what is kept, and are not there:
    each with what names or needs it."""
    needed = {
        need: f"{ref.kind} {ref.identity[:12]}, which is made from it"
        for ref in sorted(kept, key=str)
        for need in artifacts[ref].needs
    }
    return {ref: by for ref, by in (needed | dict(named)).items() if ref not in artifacts}


def purged_with(purged: Collection[Ref], artifacts: Mapping[str, Artifact]) -> set[str]:
    """The keys of manifests, among `artifacts`, of all that goes with what is
    purged: itself, and what was made from it.

    Models that learned from other texts too stay, and so do tokenizers and seeds. An expert stays that only
    started from a model which goes, since its own text is what it learned from; it goes where it holds only
    what changed of that model.
    """
    going = set(purged)
    for layer in reversed(layers(artifacts)):
        going |= {artifacts[key].ref for key in layer if _goes(artifacts[key], going)}
    return {key for key, artifact in artifacts.items() if artifact.ref in going}


def _goes(artifact: Artifact, going: Collection[Ref]) -> bool:
    if artifact.ref in going:
        return True
    if artifact.kind in ("model", "training") and "texts" in artifact.inputs:
        texts = artifact.inputs["texts"]
        is_its_own = artifact.kind == "training" or artifact.facts.get("role") in _OF_ONE_TEXT
        if is_its_own and bool(texts) and all(text in going for text in texts):
            return True
        return artifact.is_delta and not {*artifact.inputs["start"]}.isdisjoint(going)
    return artifact.kind != "tokenizer" and any(
        ref in going for ref in (*artifact.made_from, *artifact.parts)
    )


def is_expert_of(artifact: Artifact, point: BranchPoint) -> bool:
    """Whether a model or a training checkpoint is of the expert that branches there."""
    inputs = artifact.inputs
    return inputs.get("texts") == (Ref("text", point.text),) and inputs.get("start") == (point.start.model,)


def in_order(artifacts: Mapping[Ref, Artifact]) -> list[Ref]:
    """Each after what it is made from.

    Of a DEMix and its parts, which name each other, either comes first.
    """
    found: dict[Ref, None] = {}
    begun: set[Ref] = set()
    for root in artifacts:
        waiting = [root]
        while waiting:
            ref = waiting[-1]
            if ref in begun:
                found.setdefault(waiting.pop())
                continue
            begun.add(ref)
            made_from = (*artifacts[ref].made_from, *artifacts[ref].parts)
            waiting += (one for one in made_from if one in artifacts and one not in begun)
    return list(found)


def layers(artifacts: Mapping[str, Artifact]) -> list[list[str]]:
    """The keys of manifests in the order in which they are deleted: each
    layer is made from later ones alone."""
    by_ref = {artifact.ref: artifact for artifact in artifacts.values()}
    depths: dict[Ref, int] = {}
    for ref in in_order(by_ref):
        below = (*by_ref[ref].made_from, *by_ref[ref].parts)
        depths[ref] = 1 + max((depths.get(one, -1) for one in below), default=-1)
    found: list[list[str]] = [[] for _ in range(max(depths.values(), default=-1) + 1)]
    for key, artifact in artifacts.items():
        found[-1 - depths[artifact.ref]].append(key)
    return found
