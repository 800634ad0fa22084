"""Whether what a store holds fits together: versions, pins, and what artifacts are made from. Yields a line for each problem."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from btm_cluster.errors import StoreError
from btm_cluster.forest import Forest, identity_of
from btm_cluster.ledger import Artifact, Ledger, Ref, artifact_key
from btm_cluster.records import BranchPoint, is_open
from btm_cluster.upkeep.lineage import needs, reached


def check_history(
    ledger: Ledger,
    versions: Sequence[int],
    forests: Mapping[int, Forest],
    records: Collection[object],
    artifacts: Mapping[str, Artifact],
    purged: Collection[str],
) -> Iterator[str]:
    """Versions are numbered from 0 without a gap, pinned ones among them; each names the one before it, and models that are there.

    `gc` may have collected what only older ones name, and a purge what any does.
    """
    pinned = _pinned(records)
    for before, after in zip([-1, *versions], versions, strict=False):
        first, last = before + 1, after - 1
        if first <= last:
            yield _lost(f"forest version {first}{f' to {last}' if first < last else ''}", f"version {after}")
    for version in sorted(pinned - {*versions}):
        yield _lost(f"forest version {version}", "a pin of it", f"restore it, or `btm forest pin {version} --remove`")
    for version, forest in forests.items():
        yield from _check_parent(ledger, forest, has_parent=version - 1 in forests)
        for identity, manifest_hash in forest.manifests.items():
            key = artifact_key(Ref("model", identity))
            found, must_be = artifacts.get(key), version in {versions[-1], *pinned} and key not in purged
            if (found is None and must_be) or (found is not None and found.manifest_hash != manifest_hash):
                what = "another manifest" if found else "no manifest"
                yield f"forest version {version} names model {identity[:12]}\n  found:    {what}\n  expected: {manifest_hash}"


def check_needs(
    ledger: Ledger,
    forests: Mapping[int, Forest],
    records: Collection[object],
    artifacts: Mapping[str, Artifact],
    named: Collection[str],
) -> Iterator[str]:
    """What `gc` keeps for the newest and the pinned versions and for expansions in the making has all that it is made from.

    `named` are the keys of manifests that are there, whole or damaged, and of those that were purged.
    """
    present = {artifact.ref: artifact for artifact in artifacts.values() if artifact.kind != "training"}
    kept = [forest for version, forest in forests.items() if version in {max(forests), *_pinned(records)}]
    newest = forests[max(forests)] if forests else None
    points = [record for record in records if isinstance(record, BranchPoint) and is_open(record, newest)]
    roots = {Ref("model", identity) for forest in kept for identity in forest.manifests}
    roots |= {ref for point in points for ref in roots_of(point)}
    accounted = {*named, *_purged_parts(present.values(), named)}
    try:
        of_use = reached(roots, present) | {ref for ref in present if ref.kind == "source"}
        needed = {need: ref for ref in sorted(of_use, key=str) for need in needs(present[ref])}
        needed |= {ref: ref for ref in roots if ref.kind == "text"}
    except StoreError as exc:  # what an artifact of a newer version needs is unknown
        yield str(exc)
        return
    for need, of in needed.items():
        if need in present or artifact_key(need) in accounted:
            continue
        try:
            if ledger.find(need) is None:  # nor did a run make it since the store was listed
                yield _lost(f"{need.kind} {need.identity[:12]}", f"{of.kind} {of.identity[:12]}, which is made from it")
        except StoreError as exc:  # a folder in its place
            yield str(exc)


def roots_of(point: BranchPoint) -> set[Ref]:
    """What an expansion in the making starts from."""
    parents = (Ref("model", parent.identity) for parent in point.start.parents)
    return {Ref("text", point.text), point.start.model, *parents}


def _pinned(records: Iterable[object]) -> set[int]:
    return {record for record in records if isinstance(record, int)}


def _check_parent(ledger: Ledger, forest: Forest, has_parent: bool) -> Iterator[str]:
    if has_parent or forest.version == 0:
        parent = ledger.log.version_hash(forest.version - 1) if has_parent else None
        if forest.parent != parent:
            yield f"forest version {forest.version} names another parent\n  found:    {forest.parent}\n  expected: {parent}"


def _purged_parts(artifacts: Iterable[Artifact], named: Collection[str]) -> Iterator[str]:
    """What a DEMix was for a text that was purged went with it, without a tombstone of its own."""
    present = {artifact.ref for artifact in artifacts}
    for artifact in artifacts:
        for text in artifact.recipe["texts"] if artifact.recipe.get("is_demix") else ():
            if Ref("text", text) not in present and artifact_key(Ref("text", text)) in named:
                yield artifact_key(Ref("model", identity_of({"demix": artifact.identity, "text": text})))


def _lost(
    what: str, found: str, remedy: str = "restore it from a backup; where it can be, the same run makes it anew"
) -> str:
    return f"{what} is missing\n  found:    {found}\n  remedy:   {remedy}"
