"""Verifying a store: is every committed byte what was written, and does all of it fit together."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from btm_cluster.errors import StoreError
from btm_cluster.forest import Forest
from btm_cluster.ledger import (
    Artifact,
    Blob,
    Ledger,
    PurgeRecord,
    Ref,
    blob_key,
    list_ours,
    list_strays,
    version_key,
)
from btm_cluster.ledger.consistency import check_history, check_needs, check_purges
from btm_cluster.ledger.documents import Document
from btm_cluster.ledger.purge import still_there
from btm_cluster.ledger.records import (
    BASELINES,
    EXPANSIONS,
    HELD,
    PINS,
    QUARANTINE,
    read_baseline,
    read_branch_point,
    read_held,
    read_refusal,
)
from btm_cluster.ledger.tombstones import TOMBSTONES
from btm_cluster.storage import Storage

Value = TypeVar("Value")
READ_AT_ONCE = 16
"""Objects, of which chunks of 8 MiB are held."""
_RECORDS: Mapping[str, Callable[[Ledger, str], object]] = {
    BASELINES: read_baseline,
    EXPANSIONS: read_branch_point,
    HELD: read_held,
    PINS: lambda ledger, key: ledger.log.read_pin(key),
    QUARANTINE: read_refusal,
    TOMBSTONES: lambda ledger, key: ledger.tombstones.read(key),
}


@dataclass(frozen=True)
class Verified:
    """The outcome of a verification."""

    versions: int
    artifacts: int
    blobs: int
    size_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Remarks on what is no damage: objects in its folders that are none of
    the store's, and models of no forest."""


def verify(ledger: Ledger) -> Verified:
    """Reads every manifest, version, record and blob of a store, in parallel, and
    checks each byte against its hash."""
    storage = ledger.storage
    by_key = {version_key(version): version for version in ledger.log.versions()}
    record_keys = [entry.key for folder in _RECORDS for entry in list_ours(storage, folder)]
    manifest_keys = [entry.key for entry in ledger.list_manifests()]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        artifacts, problems = _read_all(pool, ledger.read_manifest, manifest_keys, storage)
        blobs = {blob_key(a.ref, blob.sha256): (a, blob) for a in artifacts.values() for blob in a.blobs}
        problems += [p for p in pool.map(lambda one: _check_blob(ledger, *one), blobs.values()) if p]
        records, damaged = _read_all(pool, lambda key: _read_record(ledger, key), record_keys, storage)
        problems += damaged
        versions = ledger.log.read(by_key.values())
        found, damaged = _read_all(pool, lambda key: versions.forest(by_key[key]), by_key, storage)
        problems += damaged
    forests = {by_key[key]: forest for key, forest in found.items()}
    purged = {
        f"artifacts/{key.removeprefix(TOMBSTONES)}" for key in record_keys if key.startswith(TOMBSTONES)
    }
    hashes = {version: versions.hash(version) for version in forests}
    problems += check_history([*by_key.values()], forests, hashes, records.values(), artifacts, purged)
    named = purged | set(manifest_keys)  # what is damaged is among the problems already
    named |= {
        key for record in records.values() if isinstance(record, PurgeRecord) for key in record.manifests
    }
    problems += check_needs(ledger, forests, records.values(), artifacts, named)
    problems += _check_purges(ledger, records, forests, artifacts)
    notes = [f"{key!r} is none of the store's, and was left alone" for key in list_strays(storage)]
    models = sum(artifact.kind == "model" for artifact in artifacts.values())
    if models and not by_key:
        notes.append(
            f"no forest version, but {models} models: of a study or a run that was stopped, or forest/ was "
            "lost"
        )
    size = sum(blob.size_bytes for _, blob in blobs.values())
    return Verified(len(by_key), len(artifacts), len(blobs), size, tuple(problems), tuple(notes))


def _read_all(
    pool: ThreadPoolExecutor, read: Callable[[str], Value | None], keys: Iterable[str], storage: Storage
) -> tuple[dict[str, Value], list[str]]:
    """The value at each key that was listed, and what was wrong with the others."""

    def attempt(key: str) -> tuple[Value | None, str]:
        try:
            found = read(key)
        except StoreError as exc:
            return None, str(exc)
        # And not deleted just now.
        is_lost = found is None and any(entry.key == key for entry in storage.list(key))
        return (
            found,
            f"{key} is listed, and cannot be read\n  remedy:   restore it, or remove it" if is_lost else "",
        )

    keys = list(keys)
    found = list(zip(keys, pool.map(attempt, keys), strict=True))
    return {key: value for key, (value, _) in found if value is not None}, [
        wrong for _, (_, wrong) in found if wrong
    ]


def _check_purges(
    ledger: Ledger,
    records: Mapping[str, object],
    forests: Mapping[int, Forest],
    artifacts: Mapping[str, Artifact],
) -> Iterator[str]:
    documents = [record for record in records.values() if isinstance(record, Document)]
    tombstones = {Ref(d.body["kind"], d.body["identity"]): d for d in documents if "kind" in d.body}
    ended = {document.body["purge"] for document in documents if "purge" in document.body}
    begun = [record for record in records.values() if isinstance(record, PurgeRecord)]
    unfinished = [record for record in begun if record.identity not in ended]
    left = [still_there(ledger, record, artifacts) for record in unfinished]
    return check_purges(tombstones, unfinished, left, forests[max(forests)] if forests else None, artifacts)


def _read_record(ledger: Ledger, key: str) -> object:
    return _RECORDS[f"{key.partition('/')[0]}/"](ledger, key)


def _check_blob(ledger: Ledger, artifact: Artifact, blob: Blob) -> str:
    """The damage of a blob; empty, if it is whole."""
    try:
        found = sum(len(chunk) for chunk in ledger.read_chunks(artifact, blob.name))
        if ledger.storage.read(blob_key(artifact.ref, blob.sha256), blob.size_bytes, 1):
            return f"{artifact.kind} {artifact.identity[:12]}, file {blob.name}: longer than {found} bytes"
    except StoreError as exc:
        return str(exc)
    return ""
