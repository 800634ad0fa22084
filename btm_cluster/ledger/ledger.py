"""The artifacts, training checkpoints and purges of one store; beside them its forest log."""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from btm_cluster.errors import IntegrityError, MissingError, UserError
from btm_cluster.identity import Ref, plain_inputs
from btm_cluster.ledger.artifact import (
    Artifact,
    Blob,
    Named,
    Origin,
    artifact_key,
    blob_key,
    named_identity,
    pin_key,
    training_folder,
    training_key,
)
from btm_cluster.ledger.blobs import BlobStream, check_blob_stands, open_blob, read_blob, write_blobs
from btm_cluster.ledger.documents import Documents, in_parallel, known_form
from btm_cluster.ledger.forest_log import ForestLog
from btm_cluster.ledger.keys import list_ours
from btm_cluster.ledger.manifests import list_manifests, read_manifest, read_manifests, read_standing
from btm_cluster.ledger.tombstones import OTHER_TEXT, Tombstones, withdraw
from btm_cluster.ledger.trainings import (
    clear_training,
    drop_older_trainings,
    latest_training,
    read_trainings,
)
from btm_cluster.storage import Entry, Storage, open_storage

logger = logging.getLogger(__name__)


class Ledger:
    """The artifacts and the forest log of one store."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.documents = Documents(storage)
        self.log = ForestLog(storage, self.documents)
        self.tombstones = Tombstones(storage, self.documents)

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
        """The artifact of each, where there is one that still serves, in order; many at
        once, since each costs a round trip to the store.

        Reading a source ends in a note that names the text. It serves while that text and its files are
        there: lost, they are read again.
        """
        if len(refs) < 2:
            return [self._find_serving(ref) for ref in refs]
        return in_parallel(self._find_serving, refs)

    def _find_serving(self, ref: Ref) -> Artifact | None:
        found = self.find(ref)
        if found is None or found.kind != "source":
            return found
        with known_form(artifact_key(ref)):
            (named,) = found.parts
        text = self.find(named)
        if text is None:
            return None
        try:
            for blob in text.blobs:
                check_blob_stands(self.storage, text.ref, blob)
        except MissingError as exc:
            logger.warning("a text is read again: %s", exc.what)
            return None
        return found

    def get(self, ref: Ref) -> Artifact:
        """The artifact, which must be there."""
        found = self.find(ref)
        if found is None:
            raise MissingError(
                f"the store has no {ref.kind} {ref.identity[:12]}",
                expected=artifact_key(ref),
                remedy="run the plan again; what that does not make anew must come from a backup",
            )
        return found

    def check_standing(self, ref: Ref, manifest_hash: str) -> None:
        """Checks that an artifact is still the one with that manifest, and that its
        blobs are there, without reading them.

        Raises:
            MissingError, IntegrityError: something was deleted or replaced, such as by a `gc` with too short
            a grace.
        """
        for blob in read_standing(self.documents, ref, manifest_hash).blobs:
            check_blob_stands(self.storage, ref, blob)

    def check_all_standing(self, manifests: Mapping[str, str]) -> None:
        """Like `check_standing` for models by identity, each blob looked up once and many at a time."""
        models = in_parallel(
            lambda item: read_standing(self.documents, Ref("model", item[0]), item[1]), manifests.items()
        )
        blobs = {blob_key(one.ref, blob.sha256): (one.ref, blob) for one in models for blob in one.blobs}
        in_parallel(lambda item: check_blob_stands(self.storage, *item), blobs.values())

    def check_not_purged(self, ref: Ref, remedy: str = OTHER_TEXT) -> None:
        """Refuses an artifact that was purged once.

        Raises:
            UserError: naming when and by whom.
        """
        self.tombstones.check_not_purged(ref, remedy)

    def list_artifacts(self, kind: str) -> Iterator[Artifact]:
        """Every committed artifact of a kind."""
        keys = [entry.key for entry in list_ours(self.storage, f"artifacts/{kind}/")]
        yield from self.read_manifests(keys).values()

    def commit(
        self,
        made: Named,
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        note: Mapping[str, Any] | None = None,
        parts: Sequence[Ref] = (),
    ) -> Artifact:
        """Stores `files` and creates the manifest of what was `made`.

        Whoever loses a race gets the winner's artifact. Files in a scratch folder must never be changed
        again: they may be linked into the store instead of being copied.

        Raises:
            UserError: it was purged meanwhile, or something that it is made from was. It is not stored then.
        """
        key = artifact_key(made.ref)
        blobs, is_first = self._write(key, made, files, facts, note or {}, parts)
        committed = self.read_manifest(key)
        if committed is None:
            raise IntegrityError(
                f"{key} vanished right after it was created", remedy="check who deletes from this store"
            )
        if not is_first:
            for blob in set(committed.blobs) - set(blobs):  # what we uploaded ourselves is there
                check_blob_stands(self.storage, made.ref, blob)
        # Looked for last: a purge sees what was created before.
        if purged := self.tombstones.found_among(committed):
            withdraw(self.storage, self.documents, committed)
            raise purged
        return committed

    def open_file(self, artifact: Artifact, name: str) -> Path:
        """A local file with the blob called `name`, checked.

        Raises:
            IntegrityError: the bytes are not those that were written, even when read a second time.
        """
        return open_blob(self.storage, artifact, name)

    def read_chunks(self, artifact: Artifact, name: str) -> Iterator[bytes]:
        """The bytes of the blob called `name` in order, each chunk checked before it
        is given; nothing is kept on disk.

        Raises:
            IntegrityError: naming the first chunk that is not what was written, even when read a second time.
        """
        return read_blob(self.storage, artifact, name)

    def stream(self, artifact: Artifact, name: str, pool: Executor, ahead: bool = True) -> BlobStream:
        """The blob called `name`, to be read in order of its bytes while `pool` reads ahead."""
        return BlobStream(self.storage, artifact, name, pool, ahead)

    def save_training(
        self,
        model: Named,
        update: int,
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        passed_over: Collection[str] = (),
    ) -> None:
        """Commits a training checkpoint of a `model` in the making at `update`, then drops the older ones.

        Files in a scratch folder must never be changed again, as in `commit`. A checkpoint at the same update stays,
        unless its manifest hash is among those that could not be loaded, `passed_over`.

        Raises:
            UserError: the model was purged meanwhile, or something that it is made from was. Nothing of it is
            stored then.
        """
        identity = model.ref.identity
        ref, key = Ref("training", identity), training_key(identity, update)
        checkpoint = Origin(ref, {"update": update, "model": model.recipe}, model.inputs)
        whole, damaged = read_trainings(self.storage, self.documents, identity)
        if key in whole and whole[key].manifest_hash in passed_over:
            self.storage.delete(key)
        for lost in damaged:  # nobody can go on from them, and one may have this very key
            self.storage.delete(lost)
        self._write(key, checkpoint, files, facts, {})
        if purged := self.tombstones.found_among(checkpoint):
            self.storage.erase(training_folder(identity))
            raise purged
        drop_older_trainings(self.storage, self.documents, identity, key)

    def latest_training(self, identity: str, passed_over: Collection[str] = ()) -> Artifact | None:
        """The training checkpoint with the most updates, but for those whose
        manifest hashes are `passed_over`.

        One that is damaged or has lost a file is passed over with a warning, since training can make it
        again.
        """
        return latest_training(self.storage, self.documents, identity, passed_over)

    def clear_training(self, identity: str) -> None:
        """Drops every training checkpoint of a model that is committed, and
        what was left of unfinished ones."""
        clear_training(self.storage, identity)

    def pin(self, version: int) -> None:
        """Keeps a version of the forest, which must be whole, from being
        collected, however old it becomes."""
        forest = self.log.version(version)
        if forest is None:
            raise UserError(
                f"there is no forest version {version}",
                found=f"versions {', '.join(map(str, self.log.versions())) or 'none'}",
            )
        self.check_all_standing(forest.manifests)
        self.documents.create(pin_key(version), {"version": version})

    def unpin(self, version: int) -> None:
        """Undoes `pin`."""
        self.storage.delete(pin_key(version))

    def _write(
        self,
        key: str,
        made: Named,
        files: Mapping[str, Path],
        facts: Mapping[str, Any],
        note: Mapping[str, Any],
        parts: Sequence[Ref] = (),
    ) -> tuple[list[Blob], bool]:
        """Stores files and their manifest; what they are, and whether the manifest was not there yet."""
        assert named_identity(made) == made.ref.identity, f"{made.ref} is not of its recipe and inputs"
        blobs = write_blobs(self.storage, made.ref, files)
        body = {
            "kind": made.ref.kind,
            "identity": made.ref.identity,
            "recipe": made.recipe,
            "inputs": plain_inputs(made.inputs),
            "parts": [str(ref) for ref in parts],
            "facts": facts,
            "blobs": [dataclasses.asdict(blob) for blob in blobs],
        }
        return blobs, self.documents.create(key, body, note)

    def read_manifest(self, key: str) -> Artifact | None:
        """The artifact whose manifest is the object at `key`; None where there is none.

        Raises:
            IntegrityError: it is not what was written, or not of the artifact that the key names.
            StoreError: it has a form that this version does not know.
        """
        return read_manifest(self.documents, key)

    def list_manifests(self) -> list[Entry]:
        """Every manifest: of artifacts and of training checkpoints."""
        return list_manifests(self.storage)

    def read_manifests(self, keys: Iterable[str] | None = None) -> dict[str, Artifact]:
        """The manifests at some keys, or all of them, by key: artifacts and training checkpoints."""
        return read_manifests(
            self.documents, [e.key for e in self.list_manifests()] if keys is None else keys
        )

    def find_listed(self, ref: Ref) -> Artifact | None:
        """Like `find`, but only where a listing shows it too: what lies behind a
        linked folder is none of the store's."""
        key = artifact_key(ref)
        return self.find(ref) if any(entry.key == key for entry in self.storage.list(key)) else None
