"""Tombstones: one for each text and model that was purged, and a record of each purge.

The record comes first and lists all that goes, so that a purge which was cut short is finished from it,
whatever is left.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from btm_cluster.errors import UserError
from btm_cluster.identity import Ref, identity_of
from btm_cluster.ledger.artifact import Artifact, Named, artifact_key, blob_key
from btm_cluster.ledger.documents import (
    Document,
    Documents,
    check_fields,
    check_place,
    in_parallel,
    known_form,
)
from btm_cluster.ledger.keys import list_ours
from btm_cluster.ledger.manifests import list_manifests, read_manifests
from btm_cluster.storage import Storage

TOMBSTONES = "tombstones/"
OTHER_TEXT = "take the domain out of the plan or the inbox; other text may come under another name"
_BEGUN, _DONE = f"{TOMBSTONES}purge/", f"{TOMBSTONES}purged/"


@dataclass(frozen=True)
class PurgeRecord:
    """Everything that a purge of a domain deletes."""

    domain: str
    texts: tuple[str, ...]
    models: Mapping[str, tuple[str, ...]]
    """With their parents, by identity."""
    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    """Those that no other manifest names."""
    prefixes: tuple[str, ...]
    """Whatever has a key that begins so: the inbox folder, trainings, small records, curves."""

    @property
    def identity(self) -> str:
        return identity_of(asdict(self))

    @property
    def refs(self) -> frozenset[Ref]:
        """The artifacts that get tombstones of their own."""
        return frozenset(
            {*(Ref("text", text) for text in self.texts), *(Ref("model", model) for model in self.models)}
        )


class Tombstones:
    """The tombstones and purge records of one store."""

    def __init__(self, storage: Storage, documents: Documents) -> None:
        self._storage, self._documents = storage, documents
        self._read: dict[str, tuple[PurgeRecord, Document]] = {}
        """Records by key: written once, so read once."""

    def find(self, ref: Ref) -> Document | None:
        """The tombstone of a text or model, whose body has `domain`, `kind`, `identity`
        and `parents`; None where there is none."""
        return self._tombstone(tombstone_key(ref))

    def read(self, key: str) -> Document | PurgeRecord | None:
        """The tombstone or record at a key; None where there is none.

        Raises:
            StoreError: it is damaged, or not what its key says.
        """
        if key.startswith(_BEGUN):
            found = self._record(key)
            return found[0] if found else None
        return self._end(key) if key.startswith(_DONE) else self._tombstone(key)

    def all(self) -> dict[Ref, Document]:
        """Every text and model that was purged, with its tombstone."""
        keys = [key for key in self._keys() if not key.startswith((_BEGUN, _DONE))]
        found = [document for document in in_parallel(self._tombstone, keys) if document is not None]
        return {Ref(document.body["kind"], document.body["identity"]): document for document in found}

    def begin(self, record: PurgeRecord) -> None:
        """Writes what is about to be deleted: the record, then a tombstone for each text and model."""
        self._documents.create(f"{_BEGUN}{record.identity}.json", asdict(record))
        # Of the same purge before a backup was restored.
        self._storage.delete(f"{_DONE}{record.identity}.json")
        parents: dict[Ref, tuple[str, ...]] = dict.fromkeys((Ref("text", text) for text in record.texts), ())
        parents |= {Ref("model", model): above for model, above in record.models.items()}
        bodies = {
            tombstone_key(ref): {
                "domain": record.domain,
                "kind": ref.kind,
                "identity": ref.identity,
                "parents": above,
            }
            for ref, above in parents.items()
        }
        in_parallel(lambda item: self._documents.create(*item), bodies.items())

    def end(self, record: PurgeRecord) -> None:
        """Notes that all of it is deleted."""
        self._documents.create(
            f"{_DONE}{record.identity}.json", {"domain": record.domain, "purge": record.identity}
        )

    def unfinished(self) -> list[PurgeRecord]:
        """Purges that were begun and have not come to their end."""
        keys = self._keys()
        begun = [
            key for key in sorted(keys) if key.startswith(_BEGUN) and key.replace(_BEGUN, _DONE) not in keys
        ]
        return [record for record, _ in self._records(begun)]

    def purged_among(self, refs: Iterable[Ref]) -> set[Ref]:
        """Those that were purged: texts and models by their tombstones, all others by the records."""
        keys = self._keys()
        manifests = {manifest for record, _ in self._records(keys) for manifest in record.manifests}
        return {ref for ref in refs if tombstone_key(ref) in keys or artifact_key(ref) in manifests}

    def check_not_purged(self, ref: Ref, remedy: str = OTHER_TEXT) -> None:
        """Refuses a text or model that was purged once.

        Raises:
            UserError: naming when and by whom.
        """
        found = self.find(ref)
        if found is not None:
            raise _purged(ref, found, remedy)

    def found_among(self, made: Named | Artifact) -> UserError | None:
        """The error of what was made from something that was purged, or was
        purged itself; None where nothing was."""
        keys = self._keys()
        if not keys:
            return None
        sources = {ref for refs in made.inputs.values() for ref in refs} | {*getattr(made, "parts", ())}
        for ref in sorted(
            {*sources, Ref("model" if made.ref.kind == "training" else made.ref.kind, made.ref.identity)},
            key=str,
        ):
            if tombstone_key(ref) in keys and (found := self.find(ref)):
                return _purged(ref, found, OTHER_TEXT)
        by_key = {artifact_key(ref): ref for ref in sources}
        for record, document in self._records(keys):
            for key in by_key.keys() & {*record.manifests}:
                return _purged(by_key[key], document, OTHER_TEXT)
        return None

    def _keys(self) -> set[str]:
        return {entry.key for entry in list_ours(self._storage, TOMBSTONES)}

    def _records(self, keys: Collection[str]) -> list[tuple[PurgeRecord, Document]]:
        found = in_parallel(self._record, sorted(key for key in keys if key.startswith(_BEGUN)))
        return [record for record in found if record is not None]

    def _record(self, key: str) -> tuple[PurgeRecord, Document] | None:
        if key not in self._read:
            document = self._documents.read(key)
            if document is None:
                return None
            with known_form(key):
                record = _record_from(document.body)
            check_place(key, f"{_BEGUN}{record.identity}.json")
            self._read[key] = record, document
        return self._read[key]

    def _end(self, key: str) -> Document | None:
        found = self._documents.read(key)
        if found is not None:
            with known_form(key):
                check_fields(found.body, {"domain", "purge"})
            check_place(key, f"{_DONE}{found.body['purge']}.json")
        return found

    def _tombstone(self, key: str) -> Document | None:
        found = self._documents.read(key)
        if found is None:
            return None
        with known_form(key):
            check_fields(found.body, {"domain", "kind", "identity", "parents"})
            own = tombstone_key(Ref(found.body["kind"], found.body["identity"]))
            list(found.body["parents"])
        check_place(key, own)
        return found


def tombstone_key(ref: Ref) -> str:
    """The key of the tombstone of a text or model that was purged."""
    return f"{TOMBSTONES}{ref.kind}/{ref.identity}.json"


def withdraw(storage: Storage, documents: Documents, artifact: Artifact) -> None:
    """Deletes an artifact that was committed just now, and its parts, but for what others name."""
    manifests = read_manifests(documents, [entry.key for entry in list_manifests(storage)])
    own = artifact_key(artifact.ref)
    needed = {ref for key, one in manifests.items() if key != own for ref in (*one.made_from, *one.parts)}
    keys = [own, *(artifact_key(part) for part in artifact.parts if part not in needed)]
    going = [artifact, *(manifests[key] for key in keys if key != own and key in manifests)]
    kept = {blob_key(a.ref, b.sha256) for key, a in manifests.items() if key not in keys for b in a.blobs}
    # Bytes first: whatever manifests are left after a crash are found by a purge.
    for key in {blob_key(one.ref, blob.sha256) for one in going for blob in one.blobs} - kept:
        storage.erase_object(key)
    for key in reversed(keys):
        storage.erase_object(key)


def _record_from(body: Mapping[str, Any]) -> PurgeRecord:
    lists = {name: tuple(map(str, body[name])) for name in ("texts", "manifests", "blobs", "prefixes")}
    models = {str(model): tuple(map(str, parents)) for model, parents in body["models"].items()}
    check_fields(body, {"domain", "models", *lists})
    return PurgeRecord(domain=str(body["domain"]), models=models, **lists)


def _purged(ref: Ref, found: Document, remedy: str) -> UserError:
    return UserError(
        f"this {ref.kind}, {ref.identity[:12]}, was purged from the store",
        found=f"purged as {found.body['domain']!r} at {found.note['created']} by {found.note['by']}",
        expected="what was purged stays away",
        remedy=remedy,
    )
