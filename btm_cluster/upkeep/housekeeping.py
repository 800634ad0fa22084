"""Keeping a store: is every committed byte what was written, and what does nothing reach any more.

Deletes only what no kept forest version, no run or expansion in the making and nothing young reaches. The inbox, refusals and
tombstones are never looked at by a collection, nor is what is none of the store's.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from btm_cluster.errors import StoreError
from btm_cluster.ledger import (
    FOLDERS,
    THREADS,
    Artifact,
    Blob,
    Ledger,
    Ref,
    artifact_key,
    blob_key,
    list_ours,
    list_strays,
    version_key,
)
from btm_cluster.records import (
    EXPANSIONS,
    HELD,
    LOGS,
    PINS,
    QUARANTINE,
    TOMBSTONES,
    open_branch_points,
    read_branch_point,
    read_held,
    read_refusal,
)
from btm_cluster.storage import Entry, Storage
from btm_cluster.upkeep.consistency import check_history, check_needs, roots_of
from btm_cluster.upkeep.lineage import KINDS, needs_of, reached

Value = TypeVar("Value")
_RECORDS: Mapping[str, Callable[[Ledger, str], object]] = {
    EXPANSIONS: read_branch_point,
    HELD: read_held,
    PINS: lambda ledger, key: ledger.log.read_pin(key),
    QUARANTINE: read_refusal,
    TOMBSTONES: lambda ledger, key: ledger.read_tombstone(key),
}


@dataclass(frozen=True)
class Verified:
    """What was read, and what was wrong with it."""

    versions: int
    artifacts: int
    blobs: int
    size_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What is no damage: objects in its folders that are none of the store's, and models of no forest."""


@dataclass(frozen=True)
class Garbage:
    """What may go: manifests first, then what only they named."""

    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    size_bytes: int
    kinds: Mapping[str, int]
    """Artifacts by kind."""
    older_than: float
    """By the store's clock; a blob that was written since is no garbage any more."""


def verify(ledger: Ledger) -> Verified:
    """Reads every manifest, version, record and blob of a store, in parallel, and checks each byte against its hash."""
    storage = ledger.storage
    by_key = {version_key(version): version for version in ledger.log.versions()}
    record_keys = [entry.key for folder in _RECORDS for entry in list_ours(storage, folder)]
    manifest_keys = [entry.key for entry in _manifest_entries(storage)]
    with ThreadPoolExecutor(THREADS) as pool:
        artifacts, problems = _read_all(pool, ledger.read_manifest, manifest_keys, storage)
        blobs = {blob_key(a.ref, blob.sha256): (a, blob) for a in artifacts.values() for blob in a.blobs}
        problems += [p for p in pool.map(lambda one: _check_blob(ledger, *one), blobs.values()) if p]
        records, damaged = _read_all(pool, lambda key: _read_record(ledger, key), record_keys, storage)
        problems += damaged
        found, damaged = _read_all(pool, lambda key: ledger.log.version(by_key[key]), by_key, storage)
        problems += damaged
    forests = {by_key[key]: forest for key, forest in found.items()}
    purged = {f"artifacts/{key.removeprefix(TOMBSTONES)}" for key in record_keys if key.startswith(TOMBSTONES)}
    problems += check_history(ledger, list(by_key.values()), forests, records.values(), artifacts, purged)
    named = purged | set(manifest_keys)  # what is damaged is among the problems already
    problems += check_needs(ledger, forests, records.values(), artifacts, named)
    problems += [f"{key} was purged, and is there again" for key in sorted(purged & artifacts.keys())]
    notes = [f"{key!r} is none of the store's, and was left alone" for key in list_strays(storage)]
    models = sum(artifact.kind == "model" for artifact in artifacts.values())
    if models and not by_key:
        notes.append(
            f"no forest version, but {models} models: of a study or a run that was stopped, or forest/ was lost"
        )
    size = sum(blob.size_bytes for _, blob in blobs.values())
    return Verified(len(by_key), len(artifacts), len(blobs), size, tuple(problems), tuple(notes))


def find_garbage(ledger: Ledger, keep_versions: int, grace_seconds: float, now: float | None = None) -> Garbage:
    """What neither the last `keep_versions` nor the pinned ones nor anything younger than `grace_seconds` reaches.

    Ages are taken by the store's own clock, which takes an object to read; with `now`, nothing is written. A forest's versions
    themselves, a few kB each, always stay.

    Raises:
        StoreError: the store has what this version of the package does not know, so that it cannot tell what that needs; or
            a model that the newest or a pinned version names has lost its manifest, so that nothing names its files.
    """
    storage = ledger.storage
    oldest_kept = (store_time(storage) if now is None else now) - grace_seconds
    named_models = _models_of_use(ledger)  # before what is there is listed, since a run may add both meanwhile
    entries = {entry.key: entry for entry in _manifest_entries(storage)}
    manifests = read_manifests(ledger, entries)
    young = {key for key in manifests if entries[key].modified >= oldest_kept}
    artifacts = {a.ref: a for key, a in manifests.items() if a.kind != "training"}
    _check_kinds(manifests)
    _check_none_lost(ledger, named_models, artifacts)

    points = open_branch_points(ledger, ledger.log.newest())
    expanding = {point.text for point in points}
    roots = {manifests[key].ref for key in young if manifests[key].kind != "training"}
    in_the_making = {
        artifact.identity: artifact
        for key, artifact in manifests.items()
        if artifact.kind == "training" and (key in young or _is_expert_of(artifact.facts.get("model", {}), expanding))
    }
    for training in in_the_making.values():
        roots |= set(needs_of("model", training.facts.get("model", {})))
    roots |= {ref for point in points for ref in roots_of(point)}
    roots |= {ref for ref, a in artifacts.items() if ref.kind == "model" and _is_expert_of(a.recipe, expanding)}
    for version in {*ledger.log.versions()[-keep_versions:], *ledger.log.pinned()}:
        forest = ledger.log.version(version)
        roots |= {Ref("model", identity) for identity in (forest.manifests if forest else ())}
    kept = reached(roots, artifacts)

    def stays(key: str) -> bool:
        artifact = manifests[key]
        if artifact.kind == "training":
            return artifact.identity in in_the_making and Ref("model", artifact.identity) not in artifacts
        return artifact.ref in kept

    going = dict.fromkeys(key for key in manifests if key not in young and not stays(key))
    named = {blob_key(a.ref, blob.sha256) for key, a in manifests.items() if key not in going for blob in a.blobs}
    blobs = [e for e in _blob_entries(storage) if e.key not in named and e.modified < oldest_kept]
    return Garbage(
        manifests=tuple(going),
        blobs=tuple(entry.key for entry in blobs),
        size_bytes=sum(entry.size_bytes for entry in blobs),
        kinds=Counter(manifests[key].kind for key in going),
        older_than=oldest_kept,
    )


def collect(ledger: Ledger, garbage: Garbage) -> None:
    """Deletes garbage: manifests before what they name or are made from, so that a crash in between leaves nothing half there."""
    with ThreadPoolExecutor(THREADS) as pool:
        for kind in reversed(KINDS):
            list(pool.map(ledger.storage.delete, [key for key in garbage.manifests if _kind_of(key) == kind]))
        # Whoever committed meanwhile named its blobs by now, or uploaded them anew: those stay.
        named = {blob_key(a.ref, blob.sha256) for a in read_manifests(ledger).values() for blob in a.blobs}
        old = {entry.key for entry in _blob_entries(ledger.storage) if entry.modified < garbage.older_than}
        list(pool.map(ledger.storage.delete, [key for key in garbage.blobs if key in old and key not in named]))


def read_manifests(ledger: Ledger, keys: Iterable[str] | None = None) -> dict[str, Artifact]:
    """Every manifest of a store, or those of some keys, by key: artifacts and training checkpoints."""
    keys = [entry.key for entry in _manifest_entries(ledger.storage)] if keys is None else list(keys)
    with ThreadPoolExecutor(THREADS) as pool:
        read = zip(keys, pool.map(ledger.read_manifest, keys), strict=True)
        return {key: artifact for key, artifact in read if artifact is not None}


def store_time(storage: Storage) -> float:
    """Now, by the store's clock: seconds since 1970. A machine's own clock may be an hour off."""
    key = f"clock/{uuid.uuid4().hex}"
    storage.create(key, b"")
    try:
        return next(storage.list(key)).modified
    finally:
        storage.delete(key)


def _is_expert_of(recipe: Mapping[str, Any], texts: set[str]) -> bool:
    """Whether a training is of an expert on one of these texts."""
    return bool(recipe.get("restart_data")) and not texts.isdisjoint(recipe.get("texts", ()))


def _check_kinds(manifests: Mapping[str, Artifact]) -> None:
    for key, artifact in manifests.items():
        if artifact.kind not in KINDS:
            raise StoreError(
                f"{key} is of a kind that this version of btm_cluster does not know",
                found=artifact.kind,
                expected=", ".join(KINDS),
                remedy="collect with the version that made it, or a newer one",
            )


def _models_of_use(ledger: Ledger) -> dict[Ref, int]:
    """Models that the newest or a pinned version names, with that version."""
    found = [ledger.log.version(version) for version in {*ledger.log.versions()[-1:], *ledger.log.pinned()}]
    return {Ref("model", identity): forest.version for forest in found if forest for identity in forest.manifests}


def _check_none_lost(ledger: Ledger, named: Mapping[Ref, int], artifacts: Mapping[Ref, Artifact]) -> None:
    for ref, version in named.items():
        if ref not in artifacts and ledger.tombstone(ref) is None:
            raise StoreError(
                f"forest version {version} names model {ref.identity[:12]}, whose files would be deleted",
                found="no manifest of it where a store has its own: lost, renamed, or behind a linked folder",
                expected=artifact_key(ref),
                remedy="restore it from a backup; `btm forest remove` goes on without a domain whose expert is lost, "
                "and `btm forest pin VERSION --remove` gives up a pinned version",
            )


def _kind_of(key: str) -> str:
    """The kind of artifact whose manifest has this key."""
    folder, kind, *_ = key.split("/")
    return folder if folder == "training" else kind


def _manifest_entries(storage: Storage) -> Iterator[Entry]:
    for folder in ("artifacts/", "training/"):
        yield from (entry for entry in list_ours(storage, folder) if entry.key.endswith(".json"))


def _blob_entries(storage: Storage) -> Iterator[Entry]:
    yield from list_ours(storage, "blobs/")
    yield from list_ours(storage, "clock/")  # a collection that crashed left it
    yield from (entry for entry in list_ours(storage, "training/") if not entry.key.endswith(".json"))
    for folder in (*FOLDERS, LOGS):  # of processes that were killed while they wrote
        yield from storage.unfinished(folder)


def _read_all(
    pool: ThreadPoolExecutor, read: Callable[[str], Value | None], keys: Iterable[str], storage: Storage
) -> tuple[dict[str, Value], list[str]]:
    """What is read at each key that was listed, and what was wrong with the others."""

    def attempt(key: str) -> tuple[Value | None, str]:
        try:
            found = read(key)
        except StoreError as exc:
            return None, str(exc)
        is_lost = found is None and any(entry.key == key for entry in storage.list(key))  # and not deleted just now
        return found, f"{key} is listed, and cannot be read\n  remedy:   restore it, or remove it" if is_lost else ""

    keys = list(keys)
    found = list(zip(keys, pool.map(attempt, keys), strict=True))
    return {key: value for key, (value, _) in found if value is not None}, [wrong for _, (_, wrong) in found if wrong]


def _read_record(ledger: Ledger, key: str) -> object:
    return _RECORDS[f"{key.partition('/')[0]}/"](ledger, key)


def _check_blob(ledger: Ledger, artifact: Artifact, blob: Blob) -> str:
    """What is wrong with a blob; nothing, if it is whole."""
    try:
        found = sum(len(chunk) for chunk in ledger.read_chunks(artifact, blob.name))
        if ledger.storage.read(blob_key(artifact.ref, blob.sha256), blob.size_bytes, 1):
            return f"{artifact.kind} {artifact.identity[:12]}, file {blob.name}: longer than {found} bytes"
    except StoreError as exc:
        return str(exc)
    return ""
