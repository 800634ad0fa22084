"""Artifacts and forest versions in a store: commit, look up, open, append.

An artifact is a manifest, created once and last, that names its blobs by content hash. What has no manifest does not
exist. Knows the layout of the store and how to check what it reads; knows nothing of texts, models or forests' meaning.

    blobs/<sha256>                     bytes
    artifacts/<kind>/<identity>.json   manifest of something made for good
    training/<identity>/<update>.json  manifest of a training checkpoint, gone once its model is committed
    training/<identity>/blobs/<sha256> its bytes: what is dropped some day shares no object with what is kept
    forest/<n>.json                    version n
"""

import dataclasses
import getpass
import hashlib
import json
import logging
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from btm_cluster.errors import IntegrityError, MissingError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, canonical_json
from btm_cluster.storage import Storage, open_storage

log = logging.getLogger(__name__)
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Blob:
    """A named file of an artifact, by its content."""

    name: str
    size_bytes: int
    sha256: str
    chunks: tuple[str, ...]
    """SHA-256 of each 8 MiB, so that ranges can be checked too."""


@dataclass(frozen=True)
class Ref:
    """Names an artifact: its kind and identity."""

    kind: str
    identity: str


@dataclass(frozen=True)
class Artifact:
    """A committed artifact, as its manifest says it."""

    kind: str
    identity: str
    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    """What was found out while making it: the same for equal runs in one numerics profile."""
    note: Mapping[str, Any]
    """Circumstances: when, where, how fast. Never used to decide anything but estimates."""
    blobs: tuple[Blob, ...]
    manifest_hash: str

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, self.identity)

    def blob(self, name: str) -> Blob:
        """The file called `name`."""
        for blob in self.blobs:
            if blob.name == name:
                return blob
        raise MissingError(
            f"{self.kind} {self.identity[:12]} has no file {name}", found=str([b.name for b in self.blobs])
        )

    def has(self, name: str) -> bool:
        """Whether the artifact has a file called `name`."""
        return any(blob.name == name for blob in self.blobs)


class Ledger:
    """The artifacts and the forest log of one store."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    @staticmethod
    def open(location: str) -> "Ledger":
        """The ledger of the store at `location`, a folder or a URL, which is not touched yet."""
        return Ledger(open_storage(location))

    def find(self, ref: Ref) -> Artifact | None:
        """The artifact, or None while it is not committed.

        Raises:
            IntegrityError: the manifest is not what was written.
        """
        return self._read_manifest(_artifact_key(ref))

    def get(self, ref: Ref) -> Artifact:
        """The artifact, which must be there."""
        found = self.find(ref)
        if found is None:
            raise MissingError(f"the store has no {ref.kind} {ref.identity[:12]}", remedy="run the plan again")
        return found

    def list_artifacts(self, kind: str) -> Iterator[Artifact]:
        """Every committed artifact of a kind."""
        for entry in self.storage.list(f"artifacts/{kind}/"):
            found = self._read_manifest(entry.key)
            if found is not None:
                yield found

    def commit(
        self,
        ref: Ref,
        recipe: Mapping[str, Any],
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        note: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Stores `files` and creates the manifest. Whoever loses a race gets the winner's artifact."""
        return self._commit(_artifact_key(ref), ref, recipe, files, facts, note or {})

    def open_file(self, artifact: Artifact, name: str) -> Path:
        """A local file with the blob called `name`, checked.

        Raises:
            IntegrityError: the bytes are not those that were written, even when read a second time.
        """
        blob = artifact.blob(name)
        key = _blob_key(artifact.ref, blob.sha256)
        for again in (False, True):  # a mismatch is read once more from the source before it fails
            path = self.storage.download(key, anew=again)
            found = describe_file(name, path)
            if found == blob:
                return path
        raise IntegrityError(
            f"{artifact.kind} {artifact.identity[:12]}, file {name} ({key}) is damaged",
            found=f"{found.size_bytes} bytes, SHA-256 {found.sha256}",
            expected=f"{blob.size_bytes} bytes, SHA-256 {blob.sha256}",
            remedy="restore the object from a backup, or delete the artifact's manifest and run the plan again",
        )

    def save_training(self, identity: str, update: int, files: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
        """Commits a training checkpoint at `update`, then drops the older ones."""
        ref, key = Ref("training", identity), _training_key(identity, update)
        self._commit(key, ref, {"update": update}, files, facts, {})
        manifests = {k: manifest for k in self._training_keys(identity) if (manifest := self._read_manifest(k))}
        kept = {blob.sha256 for k, manifest in manifests.items() if k >= key for blob in manifest.blobs}
        for older in sorted(k for k in manifests if k < key):
            self.storage.delete(older)
            for sha256 in {blob.sha256 for blob in manifests[older].blobs} - kept:
                self.storage.delete(_blob_key(ref, sha256))

    def latest_training(self, identity: str) -> Artifact | None:
        """The training checkpoint with the most updates; a damaged one is passed over, since training can make it again."""
        for key in reversed(self._training_keys(identity)):
            try:
                return self._read_manifest(key)
            except IntegrityError as exc:
                log.warning("passed over a training checkpoint: %s", exc)
        return None

    def clear_training(self, identity: str) -> None:
        """Drops every training checkpoint of a model that is committed, and what was left of unfinished ones."""
        for entry in list(self.storage.list(_training_folder(identity))):  # by key: manifests before their blobs
            self.storage.delete(entry.key)

    def _training_keys(self, identity: str) -> list[str]:
        """Of the manifests of training checkpoints, by update."""
        return [e.key for e in self.storage.list(_training_folder(identity)) if e.key.endswith(".json")]

    def forest(self, version: int | None = None) -> Forest | None:
        """A version of the forest, the newest by default; None where there is none."""
        if version is None:
            versions = self.versions()
            if not versions:
                return None
            version = versions[-1]
        document = self._read_document(_forest_key(version))
        return None if document is None else _forest_from(document)

    def versions(self) -> list[int]:
        """Numbers of all versions, ascending."""
        return [int(Path(entry.key).stem) for entry in self.storage.list("forest/")]

    def version_note(self, version: int) -> Mapping[str, Any]:
        """When, where and by whom a version was appended."""
        return dict((self._read_document(_forest_key(version)) or {}).get("note", {}))

    def append(self, forest: Forest) -> bool:
        """Appends a version to the log. False: somebody else was first; read again and try the next number."""
        previous = self._read_document(_forest_key(forest.version - 1)) if forest.version else None
        body = dataclasses.asdict(forest) | {"parent": previous["hash"] if previous else None}
        return self._create(_forest_key(forest.version), {"body": body, "note": {}})

    def _commit(
        self,
        key: str,
        ref: Ref,
        recipe: Mapping[str, Any],
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        note: Mapping[str, Any],
    ) -> Artifact:
        blobs = [describe_file(name, path) for name, path in sorted(files.items())]
        for blob in blobs:
            self.storage.upload(_blob_key(ref, blob.sha256), files[blob.name])
        body = {
            "kind": ref.kind,
            "identity": ref.identity,
            "recipe": recipe,
            "facts": facts,
            "blobs": [dataclasses.asdict(blob) for blob in blobs],
        }
        self._create(key, {"body": body, "note": note})
        committed = self._read_manifest(key)
        if committed is None:
            raise IntegrityError(
                f"{key} vanished right after it was created", remedy="check who deletes from this store"
            )
        return committed

    def _create(self, key: str, document: dict[str, Any]) -> bool:
        """Creates a hashed document once. A retry whose first try had succeeded unseen finds its own transaction."""
        transaction = uuid.uuid4().hex
        circumstances = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": f"{getpass.getuser()}@{socket.gethostname()}",
            "transaction": transaction,
        }
        document = document | {"note": document["note"] | circumstances}
        document["hash"] = hashlib.sha256(canonical_json(document)).hexdigest()
        if self.storage.create(key, json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()):
            return True
        winner = self._read_document(key)
        return winner is not None and winner["note"]["transaction"] == transaction

    def _read_document(self, key: str) -> dict[str, Any] | None:
        try:
            data = self.storage.read(key)
        except MissingError:
            return None
        try:
            document = dict(json.loads(data))
            claimed = document.pop("hash")
            found = hashlib.sha256(canonical_json(document)).hexdigest()
        except (ValueError, KeyError, TypeError) as exc:
            found = f"{len(data)} bytes: {exc}"
            raise IntegrityError(f"{key} is damaged", found=found, expected="JSON with its own hash") from exc
        if found != claimed:
            raise IntegrityError(f"{key} does not match its own hash", found=found, expected=claimed)
        return document | {"hash": claimed}

    def _read_manifest(self, key: str) -> Artifact | None:
        document = self._read_document(key)
        if document is None:
            return None
        body = document["body"]
        if (found := f"{body['kind']}/{body['identity']}") not in key:
            raise IntegrityError(f"{key} is another artifact's manifest", found=found, expected=key)
        blobs = tuple(Blob(**{**blob, "chunks": tuple(blob["chunks"])}) for blob in body["blobs"])
        return Artifact(
            body["kind"], body["identity"], body["recipe"], body["facts"], document["note"], blobs, document["hash"]
        )


def describe_file(name: str, path: Path) -> Blob:
    """The blob that the file at `path` would be: its size, SHA-256 and chunk hashes, in one pass."""
    whole, chunks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole.update(chunk)
            chunks.append(hashlib.sha256(chunk).hexdigest())
            size += len(chunk)
    return Blob(name, size, whole.hexdigest(), tuple(chunks))


def _artifact_key(ref: Ref) -> str:
    return f"artifacts/{ref.kind}/{ref.identity}.json"


def _blob_key(ref: Ref, sha256: str) -> str:
    folder = _training_folder(ref.identity) if ref.kind == "training" else ""
    return f"{folder}blobs/{sha256}"


def _training_folder(identity: str) -> str:
    return f"training/{identity}/"


def _training_key(identity: str, update: int) -> str:
    return f"{_training_folder(identity)}{update:09d}.json"


def _forest_key(version: int) -> str:
    return f"forest/{version:06d}.json"


def _forest_from(document: Mapping[str, Any]) -> Forest:
    body = dict(document["body"])
    foundation = body.pop("foundation")
    founders = tuple((name, text) for name, text in foundation.pop("domains"))
    experts = tuple(
        Expert(**{**expert, "parents": tuple(Parent(**parent) for parent in expert["parents"])})
        for expert in body.pop("experts")
    )
    return Forest(foundation=Foundation(**foundation, domains=founders), experts=experts, **body)
