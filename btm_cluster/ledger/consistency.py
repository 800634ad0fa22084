"""Whether what a store holds fits together: versions, pins, records,
purges, and what artifacts are made from.

Each check yields a line for each problem.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from btm_cluster.errors import StoreError
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ledger, PurgeRecord, Ref, artifact_key
from btm_cluster.ledger.documents import Document
from btm_cluster.ledger.lineage import lost, purged_with, reached
from btm_cluster.ledger.records import Baseline, BranchPoint, is_open

_SHOWN = 3


def check_history(
    versions: Sequence[int],
    forests: Mapping[int, Forest],
    hashes: Mapping[int, str],
    records: Collection[object],
    artifacts: Mapping[str, Artifact],
    purged: Collection[str],
) -> Iterator[str]:
    """Versions are numbered from 0 without a gap, pinned ones among them; each names
    the one before it, and models that are there.

    `gc` may have collected what only older ones name, and a purge what any does. `hashes` are those of the
    versions' documents.
    """
    pinned = _pinned(records)
    standing = {(a.identity, a.manifest_hash) for a in artifacts.values() if a.kind == "model"}
    for before, after in zip([-1, *versions], versions, strict=False):
        first, last = before + 1, after - 1
        if first <= last:
            yield _lost(f"forest version {first}{f' to {last}' if first < last else ''}", f"version {after}")
    for version in sorted(pinned - {*versions}):
        yield _lost(
            f"forest version {version}", "a pin of it", f"restore it, or `btm forest pin {version} --remove`"
        )
    kept = pinned | {*versions[-1:]}
    for version, forest in forests.items():
        yield from _check_parent(forest, hashes)
        for identity, manifest_hash in sorted(forest.manifests.items() - standing):
            key = artifact_key(Ref("model", identity))
            found, must_be = artifacts.get(key), version in kept and key not in purged
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
    """All that `gc` keeps for the newest and pinned versions, baselines and open
    expansions has everything that it is made from.

    `named` are the keys of manifests that are there, whole or damaged, and of those that were purged.
    """
    present = {artifact.ref: artifact for artifact in artifacts.values() if artifact.kind != "training"}
    kept = _pinned(records) | {max(forests, default=0)}
    used = [forest for version, forest in forests.items() if version in kept]
    newest = forests[max(forests)] if forests else None
    points = [record for record in records if isinstance(record, BranchPoint) and is_open(record, newest)]
    roots = named_roots(used, points, [record for record in records if isinstance(record, Baseline)])
    of_use = reached(roots, present) | {ref for ref in present if ref.kind == "source"}
    by_versions = named_roots(used, [], [])  # which `check_history` looks for
    for need, by in lost(roots, of_use, present).items():
        if artifact_key(need) in named or need in by_versions:
            continue
        try:
            if ledger.find_listed(need) is None:  # nor did a run make it since the store was listed
                yield _lost(f"{need.kind} {need.identity[:12]}", by)
        except StoreError as exc:  # a folder in its place
            yield str(exc)


def check_purges(
    tombstones: Mapping[Ref, Document],
    unfinished: Sequence[PurgeRecord],
    left: Sequence[Collection[str]],
    newest: Forest | None,
    artifacts: Mapping[str, Artifact],
) -> Iterator[str]:
    """Every purge came to its end, and nothing is there that it would delete.

    `left` is what is there of each unfinished one.
    """
    for record, keys in zip(unfinished, left, strict=True):
        shown = ", ".join(sorted(keys)[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
        found = (
            f"{len(keys)} of its objects are still there: {shown}" if keys else "nothing that a listing shows"
        )
        yield f"the purge of {record.domain!r} is not finished\n  found:    {found}\n  remedy:   {_purge_again(record.domain)}"
    told = {key for keys in left for key in keys}
    purged = {artifact_key(ref) for ref in tombstones}
    yield from (f"{key} was purged, and is there again" for key in sorted((purged & artifacts.keys()) - told))
    made_of_it = purged_with(tombstones, artifacts) - purged - told
    domains = {str(document.body["domain"]) for document in tombstones.values()} if made_of_it else ()
    for domain in sorted(domains):
        refs = {ref for ref, document in tombstones.items() if document.body["domain"] == domain}
        for key in sorted(purged_with(refs, artifacts) - purged - told):
            yield f"{key} is made from what was purged as {domain!r}\n  remedy:   {_purge_again(domain)}"
    for expert in newest.experts if newest else ():
        if not tombstones.keys().isdisjoint({Ref("text", expert.text), Ref("model", expert.identity)}):
            yield (
                f"the forest has the domain {expert.domain!r}, which was purged\n  found:    forest version "
                f"{newest.version if newest else ''}\n  remedy:   `btm forest remove {expert.domain}`"
            )


def named_roots(
    forests: Iterable[Forest], points: Iterable[BranchPoint], baselines: Iterable[Baseline]
) -> dict[Ref, str]:
    """Artifacts that the records of a store name, with what names them: models of
    versions, where open expansions start, baselines."""
    named: dict[Ref, str] = {}
    for forest in forests:
        named |= dict.fromkeys(
            (Ref("model", i) for i in forest.manifests), f"forest version {forest.version}"
        )
    for point in points:
        for ref in (Ref("text", point.text), point.start.model):
            named.setdefault(ref, f"the branch point of {point.domain!r}")
    for one in baselines:
        named.setdefault(
            Ref("model", one.model), f"the record of a {one.name} of forest version {one.version}"
        )
    return named


def _pinned(records: Iterable[object]) -> set[int]:
    return {record for record in records if isinstance(record, int)}


def _check_parent(forest: Forest, hashes: Mapping[int, str]) -> Iterator[str]:
    parent = hashes.get(forest.version - 1)
    if (parent or forest.version == 0) and forest.parent != parent:
        yield f"forest version {forest.version} names another parent\n  found:    {forest.parent}\n  expected: {parent}"


def _purge_again(domain: str) -> str:
    return f"run it again: `btm forest remove {domain} --purge`"


def _lost(
    what: str,
    found: str,
    remedy: str = "restore it from a backup; where it can be, the same run makes it anew",
) -> str:
    return f"{what} is missing\n  found:    {found}\n  remedy:   {remedy}"
