"""Small documents in a store, each created once, with its own hash and its circumstances: manifests, versions, records."""

import getpass
import hashlib
import json
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from btm_cluster.errors import IntegrityError, MissingError
from btm_cluster.forest import canonical_json
from btm_cluster.storage import Storage

THREADS = 16
"""Small requests under way at once, where there are many."""


@dataclass(frozen=True)
class Document:
    """What was created under a key."""

    body: dict[str, Any]
    note: Mapping[str, Any]
    """Circumstances: when, by whom, and what the creator adds."""
    hash: str
    """Of body and note."""


class Documents:
    """The documents of one store."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(self, key: str, body: Mapping[str, Any], note: Mapping[str, Any] | None = None) -> bool:
        """Creates a document once. False: there is one of that key.

        A retry whose first try had succeeded unseen finds its own transaction.
        """
        transaction = uuid.uuid4().hex
        circumstances = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": f"{getpass.getuser()}@{socket.gethostname()}",
            "transaction": transaction,
        }
        whole: dict[str, Any] = {"body": dict(body), "note": dict(note or {}) | circumstances}
        whole["hash"] = _hash_of(whole)
        if self._storage.create(key, _written(whole)):
            return True
        winner = self.read(key)
        return winner is not None and winner.note["transaction"] == transaction

    def read(self, key: str) -> Document | None:
        """The document at `key`; None where there is none.

        Raises:
            IntegrityError: it is not what was written.
        """
        try:
            data = self._storage.read(key)
        except MissingError:
            return None
        try:
            whole = dict(json.loads(data))
            claimed = whole.pop("hash")
            found = _hash_of(whole)
            same_bytes = _written(whole | {"hash": claimed}) == data  # a byte between values would not change the hash
            document = Document(dict(whole["body"]), whole["note"], claimed)
        except (ValueError, KeyError, TypeError) as exc:
            found = f"{len(data)} bytes: {exc}"
            raise IntegrityError(f"{key} is damaged", found=found, expected="JSON with its own hash") from exc
        if found != claimed or not same_bytes:
            raise IntegrityError(f"{key} does not match its own hash", found=found, expected=claimed)
        return document


def _hash_of(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document)).hexdigest()


def _written(document: Mapping[str, Any]) -> bytes:
    """A document as it is stored: one byte string per value, readable by people."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()
