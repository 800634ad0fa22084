"""Small documents in a store, each created once, with its own hash and its
circumstances: manifests, versions, records."""

import hashlib
import json
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from btm_cluster.errors import IntegrityError, MissingError, StoreError, one_line
from btm_cluster.identity import canonical_json
from btm_cluster.storage import Storage
from btm_cluster.storage.account import account

THREADS = 32
"""Small requests under way at once, where there are many: over a network each waits for its round trip."""
MOST_BYTES = 64 * 2**20
"""No document is longer: a manifest has 70 bytes for each 8 MiB of its files, so this is one of 7 TB."""


_REMEDY = "restore it from a backup"
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of a small store call on each item, in order; many are under way at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, items))


@dataclass(frozen=True)
class Document:
    """A document that was created under a key."""

    body: dict[str, Any]
    note: Mapping[str, Any]
    """Circumstances: when, by whom, and what the creator adds."""
    hash: str
    """The hash of body and note."""


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
            "by": f"{account()}@{socket.gethostname()}",
            "transaction": transaction,
        }
        whole: dict[str, Any] = {"body": dict(body), "note": dict(note or {}) | circumstances}
        whole["hash"] = _hash_of(whole)
        if self._storage.create(key, _written(whole)):
            return True
        winner = self.read(key)
        if winner is not None:
            return winner.note.get("transaction") == transaction
        raise StoreError(
            f"cannot create {key}",
            found="its name is taken, and nothing can be read there: a broken link, or deleted just now",
            remedy="move away what lies there; the same command goes on",
        )

    def read(self, key: str) -> Document | None:
        """The document at `key`; None where there is none.

        Raises:
            IntegrityError: it is not what was written.
            StoreError: it has parts that this version does not know.
        """
        try:
            data = self._storage.read(key, 0, MOST_BYTES + 1)
        except MissingError:
            return None
        if len(data) > MOST_BYTES:
            raise IntegrityError(f"{key} is damaged", found=f"more than {MOST_BYTES:,} bytes", remedy=_REMEDY)
        try:
            whole = dict(json.loads(data))
            claimed = whole.pop("hash")
            found = _hash_of(whole)
            # A byte between values would not change the hash.
            same_bytes = _written(whole | {"hash": claimed}) == data
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            found = f"{len(data)} bytes: {one_line(exc)}"
            raise IntegrityError(
                f"{key} is damaged", found=found, expected="JSON with its own hash", remedy=_REMEDY
            ) from exc
        if found != claimed or not same_bytes:
            raise IntegrityError(
                f"{key} does not match its own hash", found=found, expected=claimed, remedy=_REMEDY
            )
        with known_form(key):
            check_fields(whole, {"body", "note"})
            return Document(dict(whole["body"]), dict(whole["note"]), claimed)


@contextmanager
def known_form(key: str) -> Iterator[None]:
    """Words what is whole, and yet has not the fields that this version writes.

    Raises:
        StoreError: naming the key. No IntegrityError: nobody may drop it as damaged.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise StoreError(
            f"{key} has a form that this version of btm_cluster does not know",
            found=f"{type(exc).__name__}: {one_line(exc)}",
            expected="the fields that it writes itself",
            remedy="use the version that wrote it, or a newer one; if none did, restore it from a backup",
        ) from exc


def check_fields(value: Mapping[str, Any], names: set[str]) -> None:
    """For `known_form`: every one of these fields, and no other."""
    if value.keys() != names:
        raise ValueError(f"fields {', '.join(sorted(value.keys() ^ names))} are missing or unknown")


def check_place(key: str, own: str) -> None:
    """Refuses a record under another key than the one that its body belongs to.

    Raises:
        IntegrityError: naming both.
    """
    if own != key:
        raise IntegrityError(
            f"{key} holds what belongs to another key",
            found=own,
            expected=key,
            remedy="restore it from a backup, or move it out of the store if it is a copy",
        )


def _hash_of(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(document)).hexdigest()


def _written(document: Mapping[str, Any]) -> bytes:
    """A document as it is stored: one byte string per value, readable by people."""
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False).encode()
