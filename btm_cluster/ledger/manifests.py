"""Manifests in a store: every one that there is, and the artifact that each describes."""

from collections.abc import Iterable

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.identity import Ref
from btm_cluster.ledger.artifact import Artifact, Blob, artifact_key, check_artifact
from btm_cluster.ledger.documents import Documents, check_fields, in_parallel, known_form
from btm_cluster.ledger.keys import list_ours
from btm_cluster.storage import Entry, Storage

_FIELDS = {"kind", "identity", "recipe", "inputs", "parts", "facts", "blobs"}


def list_manifests(storage: Storage) -> list[Entry]:
    """Those of artifacts, and those of training checkpoints."""
    return [
        e
        for folder in ("artifacts/", "training/")
        for e in list_ours(storage, folder)
        if e.key.endswith(".json")
    ]


def read_manifest(documents: Documents, key: str) -> Artifact | None:
    """The artifact whose manifest is the object at `key`; None where there is none.

    Raises:
        IntegrityError: it is not what was written, or not of the artifact that the key names.
        StoreError: it has a form that this version does not know.
    """
    document = documents.read(key)
    if document is None:
        return None
    if document.body.keys() == _FIELDS - {"inputs", "parts"}:
        raise StoreError(
            f"{key} was written by an earlier version of btm_cluster, whose stores are not read any more",
            found="a manifest that does not name what it was made from",
            remedy="grow the forest anew in another `store`, or use the version that wrote this one",
        )
    with known_form(key):
        body = document.body
        check_fields(body, _FIELDS)
        blobs = tuple(Blob(**{**blob, "chunks": tuple(blob["chunks"])}) for blob in body["blobs"])
        inputs = {role: tuple(map(Ref.parse, refs)) for role, refs in body["inputs"].items()}
        parts = tuple(map(Ref.parse, body["parts"]))
        recipe, facts = dict(body["recipe"]), dict(body["facts"])
        names = (body["kind"], body["identity"])
        artifact = Artifact(*names, recipe, inputs, parts, facts, document.note, blobs, document.hash)
        check_artifact(artifact, key)
    return artifact


def read_standing(documents: Documents, ref: Ref, manifest_hash: str) -> Artifact:
    """An artifact that a forest version names, with its manifest's hash.

    Raises:
        MissingError: it is not there any more.
        IntegrityError: it has another manifest.
    """
    artifact = read_manifest(documents, artifact_key(ref))
    if artifact is None:
        raise MissingError(
            f"the store has lost {ref.kind} {ref.identity[:12]}, which a forest version names",
            expected=artifact_key(ref),
            remedy="restore it from a backup; `btm forest remove` goes on without a domain whose expert "
            "is lost",
        )
    if artifact.manifest_hash != manifest_hash:
        raise IntegrityError(
            f"{artifact_key(ref)} was replaced since this forest version was written",
            found=artifact.manifest_hash,
            expected=manifest_hash,
            remedy="restore it from a backup, or take another `store`",
        )
    return artifact


def read_manifests(documents: Documents, keys: Iterable[str]) -> dict[str, Artifact]:
    """The artifacts at those keys that have a manifest, by key."""
    keys = list(keys)
    read = zip(keys, in_parallel(lambda key: read_manifest(documents, key), keys), strict=True)
    return {key: artifact for key, artifact in read if artifact is not None}
