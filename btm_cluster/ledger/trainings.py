"""Training checkpoints of a model in the making: read back and checked, and dropped."""

import logging
from collections.abc import Collection, Mapping

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.identity import Ref
from btm_cluster.ledger.artifact import Artifact, blob_key, training_folder
from btm_cluster.ledger.documents import Documents
from btm_cluster.ledger.keys import list_ours
from btm_cluster.ledger.manifests import read_manifest
from btm_cluster.storage import Storage

logger = logging.getLogger(__name__)


def read_trainings(
    storage: Storage, documents: Documents, identity: str
) -> tuple[dict[str, Artifact], dict[str, StoreError]]:
    """The manifests of a model's training checkpoints by key, and what is
    wrong with those that are not whole.

    Another driver may drop some while they are looked at. Then the folder is looked at again, since a newer
    one is there.
    """
    before: dict[str, int] = {}
    while True:
        sizes = {entry.key: entry.size_bytes for entry in list_ours(storage, training_folder(identity))}
        manifests: dict[str, Artifact] = {}
        damaged: dict[str, StoreError] = {}
        keys = [key for key in sizes if key.endswith(".json")]
        for key in keys:
            try:
                manifest = read_manifest(documents, key)
                if manifest is not None:
                    _check_training(identity, manifest, sizes)
                    manifests[key] = manifest
            except (IntegrityError, MissingError) as exc:
                damaged[key] = exc
        if len(manifests) == len(keys) or sizes == before:
            return manifests, damaged
        before = sizes


def _check_training(identity: str, manifest: Artifact, sizes: Mapping[str, int]) -> None:
    """Whether a training checkpoint has files of the right size."""
    for blob in manifest.blobs:
        at = blob_key(Ref("training", identity), blob.sha256)
        if sizes.get(at) != blob.size_bytes:
            raise MissingError(
                f"the training checkpoint at update {manifest.recipe['update']} has lost its file "
                f"{blob.name} ({at})",
                found=f"{sizes[at]} bytes" if at in sizes else "nothing",
                expected=f"{blob.size_bytes} bytes",
            )


def latest_training(
    storage: Storage, documents: Documents, identity: str, passed_over: Collection[str]
) -> Artifact | None:
    """The training checkpoint with the most updates; see `Ledger.latest_training`."""
    manifests, damaged = read_trainings(storage, documents, identity)
    for key, exc in damaged.items():
        logger.warning("passed over the training checkpoint %s: %s", key, exc)
    return max(
        (m for m in manifests.values() if m.manifest_hash not in passed_over),
        key=lambda manifest: int(manifest.recipe["update"]),
        default=None,
    )


def drop_older_trainings(storage: Storage, documents: Documents, identity: str, key: str) -> None:
    """Deletes the training checkpoints before the one at `key`, but for blobs that later ones have too."""
    manifests, _ = read_trainings(storage, documents, identity)
    kept = {blob.sha256 for k, manifest in manifests.items() if k >= key for blob in manifest.blobs}
    for older in sorted(k for k in manifests if k < key):
        storage.delete(older)
        for sha256 in {blob.sha256 for blob in manifests[older].blobs} - kept:
            storage.delete(blob_key(Ref("training", identity), sha256))


def clear_training(storage: Storage, identity: str) -> None:
    """Deletes every training checkpoint of a model, and what was left of unfinished ones."""
    for entry in list_ours(storage, training_folder(identity)):  # by key: manifests before their blobs
        storage.delete(entry.key)
