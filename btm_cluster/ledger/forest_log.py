"""The log of a forest: its versions, appended one by one and never changed, and which of them are pinned."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from btm_cluster.errors import MissingError, StoreError
from btm_cluster.forest import Expert, Forest, Foundation, Parent
from btm_cluster.ledger.artifact import pin_key
from btm_cluster.ledger.documents import THREADS, Document, Documents, check_fields, check_place, known_form
from btm_cluster.ledger.keys import list_ours
from btm_cluster.storage import Storage


class ForestLog:
    """The forest log of one store."""

    def __init__(self, storage: Storage, documents: Documents) -> None:
        self._storage, self._documents = storage, documents

    def newest(self) -> Forest | None:
        """The newest version; None where there is none."""
        versions = self.versions()
        if not versions:
            return None
        found = self.version(versions[-1])
        if found is None:
            raise MissingError(
                f"{version_key(versions[-1])} is listed, and cannot be read",
                remedy="restore it from a backup, or remove it if it is a broken link",
            )
        return found

    def version(self, version: int) -> Forest | None:
        """A version of the forest; None where there is none of that number."""
        key = version_key(version)
        document = self._documents.read(key)
        return None if document is None else _forest_from(key, document)

    def versions(self) -> list[int]:
        """Numbers of all versions, ascending."""
        return sorted(int(PurePosixPath(entry.key).stem) for entry in list_ours(self._storage, "forest/"))

    def version_hash(self, version: int) -> str:
        """The hash of a version's document, which the next one names as its
        parent; empty where there is none."""
        document = self._documents.read(version_key(version))
        return document.hash if document is not None else ""

    def history(self) -> list[tuple[Forest, Mapping[str, Any]]]:
        """Every version with its circumstances, ascending; each is read once, many at a time."""
        keys = [version_key(version) for version in self.versions()]
        with ThreadPoolExecutor(THREADS) as pool:
            documents = zip(keys, pool.map(self._documents.read, keys), strict=True)
            return [
                (_forest_from(key, document), document.note)
                for key, document in documents
                if document is not None
            ]

    def append(self, forest: Forest) -> bool:
        """Appends a version. False: somebody else was first; read again and try the next number."""
        parent = self.version_hash(forest.version - 1) if forest.version else None
        if parent == "":
            raise StoreError(f"cannot append forest version {forest.version}", found="no version before it")
        return self._documents.create(
            version_key(forest.version), dataclasses.asdict(forest) | {"parent": parent}
        )

    def pinned(self) -> list[int]:
        """Numbers of the pinned versions."""
        keys = [entry.key for entry in list_ours(self._storage, "pins/")]
        with ThreadPoolExecutor(THREADS) as pool:
            return sorted(version for version in pool.map(self.read_pin, keys) if version is not None)

    def read_pin(self, key: str) -> int | None:
        """The version that is pinned by what lies at a key; None where nothing does."""
        document = self._documents.read(key)
        if document is None:
            return None
        with known_form(key):
            check_fields(document.body, {"version"})
            version = int(document.body["version"])
        check_place(key, pin_key(version))
        return version


def version_key(version: int) -> str:
    """The key of a version of the forest."""
    return f"forest/{version:06d}.json"


def _forest_from(key: str, document: Document) -> Forest:
    with known_form(key):
        body = dict(document.body)
        foundation = dict(body.pop("foundation"))
        founders = tuple((name, text) for name, text in foundation.pop("domains"))
        experts = tuple(
            Expert(**{**expert, "parents": tuple(Parent(**parent) for parent in expert["parents"])})
            for expert in body.pop("experts")
        )
        withdrawn = tuple(body.pop("withdrawn", ()))  # which version 0 of an older store has not
        forest = Forest(
            foundation=Foundation(**foundation, domains=founders),
            experts=experts,
            withdrawn=withdrawn,
            **body,
        )
        own = version_key(forest.version)
    check_place(key, own)
    return forest
