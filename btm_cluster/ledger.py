"""Artifacts and forest versions in a store: commit, look up, open, append.

An artifact is a manifest, created once and last, that names its blobs by content hash. What has no manifest does not
exist. Knows the layout of the store and how to check what it reads; knows nothing of texts, models or forests' meaning.

    blobs/<sha256>                     bytes
    artifacts/<kind>/<identity>.json   manifest of something made for good
    training/<identity>/<update>.json  manifest of a training checkpoint, gone once its model is committed
    training/<identity>/blobs/<sha256> its bytes: what is dropped some day shares no object with what is kept
    forest/<n>.json                    version n
    pins/<n>.json                      version n is never collected
    tombstones/<kind>/<identity>.json  a text or model that was purged, and never comes back

Other records that are created once have their places in `records.py`.
"""

import dataclasses
import getpass
import hashlib
import json
import logging
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from btm_cluster.errors import IntegrityError, MissingError, StoreError, UserError
from btm_cluster.forest import Expert, Forest, Foundation, Parent, canonical_json
from btm_cluster.storage import Storage, open_storage

log = logging.getLogger(__name__)
CHUNK_BYTES = 8 * 2**20
THREADS = 16
"""Small requests under way at once, where there are many."""


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
    """Circumstances: when, where, how fast, called what. Never used to decide anything but estimates and what is purged."""
    blobs: tuple[Blob, ...]
    manifest_hash: str

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, self.identity)

    @property
    def parents(self) -> tuple[str, ...]:
        """Identities of the models that a model was made from."""
        start = self.recipe.get("start") or {}
        return tuple(p["identity"] for p in self.recipe.get("average") or start.get("parents") or ())

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
        return self.read_manifest(artifact_key(ref))

    def find_all(self, refs: Sequence[Ref]) -> list[Artifact | None]:
        """`find` for each, in order; many at once, since each costs a round trip to the store."""
        if len(refs) < 2:
            return [self.find(ref) for ref in refs]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="find") as pool:
            return list(pool.map(self.find, refs))

    def get(self, ref: Ref) -> Artifact:
        """The artifact, which must be there."""
        found = self.find(ref)
        if found is None:
            raise MissingError(f"the store has no {ref.kind} {ref.identity[:12]}", remedy="run the plan again")
        return found

    def check_standing(self, ref: Ref, manifest_hash: str) -> None:
        """Checks that an artifact is still the one with that manifest, and that its blobs are there, without reading them.

        Raises:
            MissingError, IntegrityError: something was deleted or replaced, such as by a `gc` with too short a grace.
        """
        for blob in self._standing(ref, manifest_hash).blobs:
            self._check_blob_stands(ref, blob)

    def check_all_standing(self, manifests: Mapping[str, str]) -> None:
        """Like `check_standing` for models by identity, each blob looked up once and many at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            blobs: dict[str, tuple[Ref, Blob]] = {}
            for artifact in pool.map(lambda item: self._standing(Ref("model", item[0]), item[1]), manifests.items()):
                blobs |= {blob_key(artifact.ref, blob.sha256): (artifact.ref, blob) for blob in artifact.blobs}
            list(pool.map(lambda item: self._check_blob_stands(*item), blobs.values()))

    def tombstone(self, ref: Ref) -> Mapping[str, Any] | None:
        """What is left of an artifact that was purged; None where none was."""
        return self.read_record(tombstone_key(ref))

    def parents_of(self, model: str) -> tuple[str, ...]:
        """Identities of the models that one was made from, even if it was purged."""
        tombstone = None if (found := self.find(Ref("model", model))) else self.tombstone(Ref("model", model))
        return tuple(tombstone["parents"]) if tombstone else (found or self.get(Ref("model", model))).parents

    def check_not_purged(
        self,
        ref: Ref,
        remedy: str = "take the domain out of the plan or the inbox; other text may come under another name",
    ) -> None:
        """Refuses an artifact that was purged once.

        Raises:
            UserError: naming when and by whom.
        """
        found = self.tombstone(ref)
        if found is not None:
            raise UserError(
                f"this {ref.kind}, {ref.identity[:12]}, was purged from the store",
                found=f"purged as {found['domain']!r} at {found['note']['created']} by {found['note']['by']}",
                expected="what was purged stays away",
                remedy=remedy,
            )

    def create_record(self, key: str, body: Mapping[str, Any]) -> bool:
        """Creates a small document once, with its hash and its circumstances. False: there is one of that key."""
        return self._create(key, {"body": dict(body), "note": {}})

    def read_record(self, key: str) -> Mapping[str, Any] | None:
        """A record's body, and under `note` its circumstances; None where there is none.

        Raises:
            IntegrityError: it is not what was written.
        """
        document = self._read_document(key)
        return None if document is None else {**document["body"], "note": document["note"]}

    def list_artifacts(self, kind: str) -> Iterator[Artifact]:
        """Every committed artifact of a kind."""
        keys = [entry.key for entry in self.storage.list(f"artifacts/{kind}/")]
        with ThreadPoolExecutor(THREADS) as pool:
            yield from (found for found in pool.map(self.read_manifest, keys) if found is not None)

    def commit(
        self,
        ref: Ref,
        recipe: Mapping[str, Any],
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        note: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Stores `files` and creates the manifest. Whoever loses a race gets the winner's artifact."""
        return self._commit(artifact_key(ref), ref, recipe, files, facts, note or {})

    def open_file(self, artifact: Artifact, name: str) -> Path:
        """A local file with the blob called `name`, checked.

        Raises:
            IntegrityError: the bytes are not those that were written, even when read a second time.
        """
        blob = artifact.blob(name)
        key = blob_key(artifact.ref, blob.sha256)
        for again in (False, True):  # a mismatch is read once more from the source before it fails
            path = self.storage.download(key, anew=again)
            found = describe_file(name, path)
            if found == blob:
                return path
        raise _damaged(
            artifact,
            blob,
            f"{found.size_bytes} bytes, SHA-256 {found.sha256}",
            f"{blob.size_bytes} bytes, SHA-256 {blob.sha256}",
        )

    def read_chunks(self, artifact: Artifact, name: str) -> Iterator[bytes]:
        """The bytes of the blob called `name` in order, each chunk checked before it is given; nothing is kept on disk.

        Raises:
            IntegrityError: naming the first chunk that is not what was written, even when read a second time.
        """
        blob = artifact.blob(name)
        key = blob_key(artifact.ref, blob.sha256)
        for i, expected in enumerate(blob.chunks):
            for _ in range(2):
                chunk = self.storage.read(key, i * CHUNK_BYTES, CHUNK_BYTES)
                found = hashlib.sha256(chunk).hexdigest()
                if found == expected:
                    break
            else:
                at = f"bytes {i * CHUNK_BYTES:,} to {i * CHUNK_BYTES + len(chunk):,}"
                raise _damaged(artifact, blob, f"SHA-256 {found} of {at}", f"SHA-256 {expected}")
            yield chunk

    def save_training(self, identity: str, update: int, files: Mapping[str, Path], facts: Mapping[str, Any]) -> None:
        """Commits a training checkpoint at `update`, then drops the older ones."""
        ref, key = Ref("training", identity), _training_key(identity, update)
        self._trainings(identity)  # a damaged one may have this very key
        self._commit(key, ref, {"update": update}, files, facts, {})
        manifests = self._trainings(identity)
        kept = {blob.sha256 for k, manifest in manifests.items() if k >= key for blob in manifest.blobs}
        for older in sorted(k for k in manifests if k < key):
            self.storage.delete(older)
            for sha256 in {blob.sha256 for blob in manifests[older].blobs} - kept:
                self.storage.delete(blob_key(ref, sha256))

    def _trainings(self, identity: str) -> dict[str, Artifact]:
        """The manifests of a model's training checkpoints, by key; damaged ones are dropped, since nobody can go on from them."""
        manifests = {}
        for key in self._training_keys(identity):
            try:
                manifest = self.read_manifest(key)
            except IntegrityError as exc:
                log.warning("dropped a training checkpoint: %s", exc)
                self.storage.delete(key)
                continue
            if manifest is not None:
                manifests[key] = manifest
        return manifests

    def latest_training(self, identity: str) -> Artifact | None:
        """The training checkpoint with the most updates; a damaged one is passed over, since training can make it again."""
        for key in reversed(self._training_keys(identity)):
            try:
                return self.read_manifest(key)
            except IntegrityError as exc:
                log.warning("passed over a training checkpoint: %s", exc)
        return None

    def clear_training(self, identity: str) -> None:
        """Drops every training checkpoint of a model that is committed, and what was left of unfinished ones."""
        for entry in list(self.storage.list(training_folder(identity))):  # by key: manifests before their blobs
            self.storage.delete(entry.key)

    def _standing(self, ref: Ref, manifest_hash: str) -> Artifact:
        artifact = self.get(ref)
        if artifact.manifest_hash != manifest_hash:
            raise IntegrityError(
                f"{artifact_key(ref)} was replaced since this forest version was written",
                found=artifact.manifest_hash,
                expected=manifest_hash,
                remedy="restore it from a backup, or take another `store`",
            )
        return artifact

    def _check_blob_stands(self, ref: Ref, blob: Blob) -> None:
        key = blob_key(ref, blob.sha256)
        if [entry.size_bytes for entry in self.storage.list(key)] != [blob.size_bytes]:
            raise MissingError(
                f"{ref.kind} {ref.identity[:12]} has lost its file {blob.name} ({key})",
                remedy=f"delete {artifact_key(ref)} and run the plan again, which makes it anew",
            )

    def _training_keys(self, identity: str) -> list[str]:
        """Of the manifests of training checkpoints, by update."""
        return [e.key for e in self.storage.list(training_folder(identity)) if e.key.endswith(".json")]

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

    def pin(self, version: int) -> None:
        """Keeps a version from being collected, however old it becomes."""
        forest = self.forest(version)
        if forest is None:
            raise UserError(f"there is no forest version {version}", found=f"versions {self.versions()}")
        self.check_all_standing(forest.manifests)
        self._create(_pin_key(version), {"body": {"version": version}, "note": {}})

    def unpin(self, version: int) -> None:
        """Undoes `pin`."""
        self.storage.delete(_pin_key(version))

    def pinned(self) -> list[int]:
        """Numbers of the pinned versions."""
        return [int(Path(entry.key).stem) for entry in self.storage.list("pins/")]

    def version_hash(self, version: int) -> str:
        """The hash of a version's document, which the next one names as its parent."""
        return str((self._read_document(_forest_key(version)) or {}).get("hash", ""))

    def history(self) -> list[tuple[Forest, Mapping[str, Any]]]:
        """Every version with its circumstances, ascending; each is read once, many at a time."""
        keys = [_forest_key(version) for version in self.versions()]
        with ThreadPoolExecutor(THREADS) as pool:
            documents = [document for document in pool.map(self._read_document, keys) if document is not None]
        return [(_forest_from(document), dict(document["note"])) for document in documents]

    def append(self, forest: Forest) -> bool:
        """Appends a version to the log. False: somebody else was first; read again and try the next number."""
        previous = self._read_document(_forest_key(forest.version - 1)) if forest.version else None
        if forest.version and previous is None:
            raise StoreError(f"cannot append forest version {forest.version}", found="no version before it")
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
            self.storage.upload(blob_key(ref, blob.sha256), files[blob.name])
        body = {
            "kind": ref.kind,
            "identity": ref.identity,
            "recipe": recipe,
            "facts": facts,
            "blobs": [dataclasses.asdict(blob) for blob in blobs],
        }
        self._create(key, {"body": body, "note": note})
        committed = self.read_manifest(key)
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
        if self.storage.create(key, _written(document)):
            return True
        winner = self._read_document(key)
        return winner is not None and winner["note"]["transaction"] == transaction

    def _read_document(self, key: str) -> dict[str, Any] | None:
        try:
            data = self.storage.read(key)
        except MissingError:
            return None
        try:
            whole = dict(json.loads(data))
            same_bytes = _written(whole) == data  # a byte between values would not change the hash
            document = {name: value for name, value in whole.items() if name != "hash"}
            found = hashlib.sha256(canonical_json(document)).hexdigest()
            claimed = whole["hash"]
        except (ValueError, KeyError, TypeError) as exc:
            found = f"{len(data)} bytes: {exc}"
            raise IntegrityError(f"{key} is damaged", found=found, expected="JSON with its own hash") from exc
        if found != claimed or not same_bytes:
            raise IntegrityError(f"{key} does not match its own hash", found=found, expected=claimed)
        return whole

    def read_manifest(self, key: str) -> Artifact | None:
        """The artifact whose manifest is the object at `key`; None where there is none."""
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


def _written(document: Mapping[str, Any]) -> bytes:
    """A document as it is stored: one byte string per value, readable by people."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()


def _damaged(artifact: Artifact, blob: Blob, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{artifact.kind} {artifact.identity[:12]}, file {blob.name} ({blob_key(artifact.ref, blob.sha256)}) is damaged",
        found=found,
        expected=expected,
        remedy="restore the object from a backup, or delete the artifact's manifest and run the plan again",
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


def artifact_key(ref: Ref) -> str:
    """Of an artifact's manifest."""
    return f"artifacts/{ref.kind}/{ref.identity}.json"


def blob_key(ref: Ref, sha256: str) -> str:
    """Of a file of an artifact."""
    folder = training_folder(ref.identity) if ref.kind == "training" else ""
    return f"{folder}blobs/{sha256}"


def tombstone_key(ref: Ref) -> str:
    """Of what is left of an artifact that was purged."""
    return f"tombstones/{ref.kind}/{ref.identity}.json"


def training_folder(identity: str) -> str:
    return f"training/{identity}/"


def _training_key(identity: str, update: int) -> str:
    return f"{training_folder(identity)}{update:09d}.json"


def _forest_key(version: int) -> str:
    return f"forest/{version:06d}.json"


def _pin_key(version: int) -> str:
    return f"pins/{version:06d}.json"


def _forest_from(document: Mapping[str, Any]) -> Forest:
    body = dict(document["body"])
    foundation = body.pop("foundation")
    founders = tuple((name, text) for name, text in foundation.pop("domains"))
    experts = tuple(
        Expert(**{**expert, "parents": tuple(Parent(**parent) for parent in expert["parents"])})
        for expert in body.pop("experts")
    )
    withdrawn = tuple(body.pop("withdrawn", ()))  # which version 0 of an older store has not
    return Forest(foundation=Foundation(**foundation, domains=founders), experts=experts, withdrawn=withdrawn, **body)
