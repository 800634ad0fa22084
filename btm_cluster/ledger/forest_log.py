"""The log of a forest: its versions, appended one by one and never changed, and which of them are pinned."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from btm_cluster.errors import StoreError
from btm_cluster.forest import Expert, Forest, Foundation, Parent
from btm_cluster.ledger.documents import THREADS, Document, Documents
from btm_cluster.storage import Storage


class ForestLog:
    """The forest log of one store."""

    def __init__(self, storage: Storage, documents: Documents) -> None:
        self._storage, self._documents = storage, documents

    def newest(self) -> Forest | None:
        """The newest version; None where there is none."""
        versions = self.versions()
        return self.version(versions[-1]) if versions else None

    def version(self, version: int) -> Forest | None:
        """A version of the forest; None where there is none of that number."""
        document = self._documents.read(_version_key(version))
        return None if document is None else _forest_from(document)

    def versions(self) -> list[int]:
        """Numbers of all versions, ascending."""
        return [int(Path(entry.key).stem) for entry in self._storage.list("forest/")]

    def version_hash(self, version: int) -> str:
        """The hash of a version's document, which the next one names as its parent; empty where there is none."""
        document = self._documents.read(_version_key(version))
        return document.hash if document is not None else ""

    def history(self) -> list[tuple[Forest, Mapping[str, Any]]]:
        """Every version with its circumstances, ascending; each is read once, many at a time."""
        keys = [_version_key(version) for version in self.versions()]
        with ThreadPoolExecutor(THREADS) as pool:
            documents = [document for document in pool.map(self._documents.read, keys) if document is not None]
        return [(_forest_from(document), document.note) for document in documents]

    def append(self, forest: Forest) -> bool:
        """Appends a version. False: somebody else was first; read again and try the next number."""
        parent = self.version_hash(forest.version - 1) if forest.version else None
        if parent == "":
            raise StoreError(f"cannot append forest version {forest.version}", found="no version before it")
        return self._documents.create(_version_key(forest.version), dataclasses.asdict(forest) | {"parent": parent})

    def pinned(self) -> list[int]:
        """Numbers of the pinned versions."""
        return [int(Path(entry.key).stem) for entry in self._storage.list("pins/")]


def _version_key(version: int) -> str:
    return f"forest/{version:06d}.json"


def _forest_from(document: Document) -> Forest:
    body = dict(document.body)
    foundation = dict(body.pop("foundation"))
    founders = tuple((name, text) for name, text in foundation.pop("domains"))
    experts = tuple(
        Expert(**{**expert, "parents": tuple(Parent(**parent) for parent in expert["parents"])})
        for expert in body.pop("experts")
    )
    withdrawn = tuple(body.pop("withdrawn", ()))  # which version 0 of an older store has not
    return Forest(foundation=Foundation(**foundation, domains=founders), experts=experts, withdrawn=withdrawn, **body)
