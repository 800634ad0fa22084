"""Collecting what nothing reaches any more: decided by `find_garbage`, deleted by `collect`.

Kept is what a kept forest version, a baseline, a run or an expansion in the making, or anything young
reaches. The inbox, refusals and tombstones are never looked at, nor is what is none of the store's.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from btm_cluster.errors import StoreError
from btm_cluster.forest import Forest
from btm_cluster.ledger import FOLDERS, Artifact, Ledger, Ref, artifact_key, blob_key, in_parallel, list_ours
from btm_cluster.ledger.consistency import named_roots
from btm_cluster.ledger.lineage import is_expert_of, layers, lost, reached
from btm_cluster.ledger.records import LOGS, BranchPoint, list_baselines, open_branch_points
from btm_cluster.requests import PROFILE
from btm_cluster.steps.registry import STEPS
from btm_cluster.storage import Entry, Storage

KINDS = frozenset({"text", "training", PROFILE, *(request.kind for request in STEPS)})
"""Every kind of artifact."""


@dataclass(frozen=True)
class Garbage:
    """Garbage that may go: manifests first, then what only they named."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    unfinished: tuple[str, ...]
    """Unfinished uploads of processes that were killed while they wrote."""
    size_bytes: int
    kinds: Mapping[str, int]
    """Artifacts by kind."""
    older_than: float
    """By the store's clock; a blob that was written since is no garbage any more."""


def find_garbage(
    ledger: Ledger, keep_versions: int, grace_seconds: float, now: float | None = None
) -> Garbage:
    """Garbage: what neither the last `keep_versions` nor the pinned ones nor anything
    younger than `grace_seconds` reaches.

    Ages are taken by the store's own clock, which takes an object to read; with `now`, nothing is written. A
    forest's versions themselves, a few kB each, always stay.

    Raises:
        StoreError: the store has what this version of the package does not know, so that it cannot tell what
            that needs; or something has lost its manifest that a record names or that what is kept needs, so
            that nothing names its files.
    """
    storage = ledger.storage
    oldest_kept = (store_time(storage) if now is None else now) - grace_seconds
    # Records first, since a run may add to both meanwhile: what they name was there before.
    points = open_branch_points(ledger, ledger.log.newest())
    named, last = _named(ledger, points), _models_of_last(ledger, keep_versions)
    entries = {entry.key: entry for entry in ledger.list_manifests()}
    manifests = ledger.read_manifests(entries)
    _check_kinds(manifests)
    young = {key for key in manifests if entries[key].modified >= oldest_kept}
    making = _in_the_making(manifests, young, points)
    named = _named_by_trainings(making) | named
    kept = _kept(ledger, named, {*named, *last, *_young_or_to_be_merged(manifests, young, points)}, manifests)
    kept |= {t.ref for t in making if artifact_key(Ref("model", t.identity)) not in manifests}

    going = [key for key, artifact in manifests.items() if key not in young and artifact.ref not in kept]
    staying = {key: manifests[key] for key in manifests.keys() - {*going}}
    blobs = _unnamed_blobs(ledger, staying, oldest_kept)
    unfinished = [entry for entry in _unfinished(storage) if entry.modified < oldest_kept]
    return Garbage(
        manifests=tuple(going),
        blobs=tuple(entry.key for entry in blobs),
        unfinished=tuple(entry.key for entry in unfinished),
        size_bytes=sum(entry.size_bytes for entry in (*blobs, *unfinished)),
        kinds=Counter(manifests[key].kind for key in going),
        older_than=oldest_kept,
    )


def collect(ledger: Ledger, garbage: Garbage) -> None:
    """Deletes garbage: manifests before what they name or are made from, so that a
    crash in between leaves nothing half there."""
    storage = ledger.storage
    for layer in layers(ledger.read_manifests(garbage.manifests)):
        in_parallel(storage.delete, layer)
    # Whoever committed meanwhile named its blobs by now, or uploaded them anew: those stay.
    old = {entry.key for entry in _unnamed_blobs(ledger, ledger.read_manifests(), garbage.older_than)}
    in_parallel(storage.delete, [key for key in garbage.blobs if key in old])
    broken_off = {entry.key for entry in _unfinished(storage) if entry.modified < garbage.older_than}
    in_parallel(storage.discard, [key for key in garbage.unfinished if key in broken_off])


def store_time(storage: Storage) -> float:
    """Now, by the store's clock: seconds since 1970. A machine's own clock may be an hour off."""
    key = f"clock/{uuid.uuid4().hex}"
    storage.create(key, b"")
    try:
        return next(storage.list(key)).modified
    finally:
        storage.delete(key)


def _named(ledger: Ledger, points: list[BranchPoint]) -> dict[Ref, str]:
    """Artifacts that must be there or have a tombstone: the newest and pinned versions,
    baselines and open branch points name them."""
    used = _forests(ledger, {*ledger.log.versions()[-1:], *ledger.log.pinned()})
    return named_roots(used, points, list_baselines(ledger))


def _models_of_last(ledger: Ledger, keep_versions: int) -> set[Ref]:
    """Models that the newest versions name.

    Those of older ones may have been collected before, when fewer were kept.
    """
    forests = _forests(ledger, ledger.log.versions()[-keep_versions:])
    return {Ref("model", identity) for forest in forests for identity in forest.manifests}


def _forests(ledger: Ledger, versions: Collection[int]) -> list[Forest]:
    read = ledger.log.read(versions)
    return [forest for version in versions if (forest := read.forest(version))]


def _in_the_making(
    manifests: Mapping[str, Artifact], young: set[str], points: list[BranchPoint]
) -> list[Artifact]:
    """Training checkpoints that somebody may go on from: young ones, and those of
    experts that are still to be merged."""
    trainings = {key: artifact for key, artifact in manifests.items() if artifact.kind == "training"}
    identities = {a.identity for key, a in trainings.items() if key in young or _is_of_any(a, points)}
    return [artifact for artifact in trainings.values() if artifact.identity in identities]


def _named_by_trainings(making: list[Artifact]) -> dict[Ref, str]:
    """Artifacts that trainings in the making need, with the model of each."""
    return {
        ref: f"the training of model {one.identity[:12]}" for one in reversed(making) for ref in one.made_from
    }


def _young_or_to_be_merged(
    manifests: Mapping[str, Artifact], young: set[str], points: list[BranchPoint]
) -> set[Ref]:
    """Young artifacts, and experts that were trained and are still to be merged, or held back."""
    artifacts = {key: artifact for key, artifact in manifests.items() if artifact.kind != "training"}
    return {
        a.ref for key, a in artifacts.items() if key in young or (a.kind == "model" and _is_of_any(a, points))
    }


def _is_of_any(artifact: Artifact, points: list[BranchPoint]) -> bool:
    return any(is_expert_of(artifact, point) for point in points)


def _kept(
    ledger: Ledger, named: Mapping[Ref, str], roots: set[Ref], manifests: dict[str, Artifact]
) -> set[Ref]:
    """Artifacts that are reached.

    Manifests that came since the listing, and that something kept needs, are added to `manifests`.

    Raises:
        StoreError: something that is named or needed is lost.
    """
    while True:
        artifacts = {artifact.ref: artifact for artifact in manifests.values() if artifact.kind != "training"}
        kept = reached(roots, artifacts)
        missing = lost(named, kept, artifacts)
        if missing:
            purged = ledger.tombstones.purged_among(missing)
            missing = {ref: by for ref, by in missing.items() if ref not in purged}
        came = dict(zip(missing, in_parallel(ledger.find_listed, missing), strict=True))
        for ref, artifact in came.items():
            if artifact is None:
                raise _has_lost(ref, missing[ref])
            manifests[artifact_key(ref)] = artifact
        if not came:
            return kept
        roots = roots | came.keys()


def _has_lost(ref: Ref, by: str) -> StoreError:
    is_of_a_version = by.startswith("forest version")
    what = f"{by} names model" if is_of_a_version else f"{by.partition(',')[0]} needs {ref.kind}"
    others = (
        "; `btm forest remove` goes on without a domain whose expert is lost, "
        "and `btm forest pin VERSION --remove` gives up a pinned version"
        if is_of_a_version
        else "; where it can be, the same run makes it anew"
    )
    return StoreError(
        f"{what} {ref.identity[:12]}, whose files would be deleted",
        found="no manifest of it where a store has its own: lost, renamed, or behind a linked folder",
        expected=artifact_key(ref),
        remedy=f"restore it from a backup{others}",
    )


def _check_kinds(manifests: Mapping[str, Artifact]) -> None:
    for key, artifact in manifests.items():
        if artifact.kind not in KINDS:
            raise StoreError(
                f"{key} is of a kind that this version of btm_cluster does not know",
                found=artifact.kind,
                expected=", ".join(sorted(KINDS)),
                remedy="collect with the version that made it, or a newer one",
            )


def _unnamed_blobs(ledger: Ledger, manifests: Mapping[str, Artifact], older_than: float) -> list[Entry]:
    """Old blobs that none of the manifests names, and what a collection that crashed left of its clock."""
    named = {
        blob_key(artifact.ref, blob.sha256) for artifact in manifests.values() for blob in artifact.blobs
    }
    entries = [*list_ours(ledger.storage, "blobs/"), *list_ours(ledger.storage, "clock/")]
    entries += [entry for entry in list_ours(ledger.storage, "training/") if not entry.key.endswith(".json")]
    return [entry for entry in entries if entry.key not in named and entry.modified < older_than]


def _unfinished(storage: Storage) -> Iterator[Entry]:
    """Unfinished uploads: of processes that were killed while they wrote, and of those that are writing."""
    for folder in (*FOLDERS, LOGS):
        yield from storage.unfinished(folder)
