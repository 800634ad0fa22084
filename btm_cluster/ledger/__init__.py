"""Artifacts and forest versions in a store: commit, look up, open, append.

An artifact is a manifest, created once and last, that names its blobs by content hash. What has no manifest
does not exist. Knows the layout of the store and how to check what it reads; knows nothing of texts, models
or forests' meaning.

    blobs/<sha256>                     bytes
    artifacts/<kind>/<identity>.json   manifest of something made for good
    training/<identity>/<update>.json  manifest of a training checkpoint, gone once its model is committed
    training/<identity>/blobs/<sha256> its bytes: what is dropped some day shares no object with what is kept
    forest/<n>.json                    version n, whole or as what it changes of an earlier one
    pins/<n>.json                      version n is never collected
    tombstones/<kind>/<identity>.json  a text or model that was purged, and never comes back
    tombstones/purge/<id>.json         everything that a purge deletes, written before it does
    tombstones/purged/<id>.json        it has

Other documents that are created once have their places in `records.py`. `keys.py` has the form of every key;
what has another is none of the store's. Whatever is read is compared with its key: number, kind, identity,
and the hash of its recipe.
"""

from btm_cluster.identity import Inputs, Ref, identity_by
from btm_cluster.ledger.artifact import (
    CHUNK_BYTES,
    Artifact,
    Blob,
    Named,
    Origin,
    artifact_key,
    blob_key,
    describe_file,
    training_folder,
)
from btm_cluster.ledger.documents import THREADS, check_fields, check_place, in_parallel, known_form
from btm_cluster.ledger.forest_log import ForestLog, version_key
from btm_cluster.ledger.keys import FOLDERS, is_ours, list_ours, list_strays
from btm_cluster.ledger.ledger import Ledger
from btm_cluster.ledger.tombstones import PurgeRecord, tombstone_key

__all__ = [
    "CHUNK_BYTES",
    "FOLDERS",
    "THREADS",
    "Artifact",
    "Blob",
    "ForestLog",
    "Inputs",
    "Ledger",
    "Named",
    "Origin",
    "PurgeRecord",
    "Ref",
    "artifact_key",
    "blob_key",
    "check_fields",
    "check_place",
    "describe_file",
    "identity_by",
    "in_parallel",
    "is_ours",
    "known_form",
    "list_ours",
    "list_strays",
    "tombstone_key",
    "training_folder",
    "version_key",
]
