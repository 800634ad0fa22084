"""The log of a forest: its versions, appended one by one and never changed, and which of them are pinned."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.forest import Forest
from btm_cluster.ledger.artifact import pin_key
from btm_cluster.ledger.documents import (
    Document,
    Documents,
    check_fields,
    check_place,
    in_parallel,
    known_form,
)
from btm_cluster.ledger.keys import list_ours
from btm_cluster.ledger.version_bodies import Base, base_of, bases_of, body_of, changed, is_large, whole
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
        return Versions(self._documents).forest(version)

    def versions(self) -> list[int]:
        """Numbers of all versions, ascending."""
        return sorted(int(PurePosixPath(entry.key).stem) for entry in list_ours(self._storage, "forest/"))

    def read(self, versions: Iterable[int]) -> "Versions":
        """Some versions, whose documents are read once, many at a time."""
        read = Versions(self._documents)
        read.fetch(versions)
        return read

    def version_hash(self, version: int) -> str:
        """The hash of a version's document, which the next one names as its
        parent; empty where there is none."""
        return Versions(self._documents).hash(version)

    def history(self) -> list[tuple[Forest, Mapping[str, Any]]]:
        """Every version with its circumstances, ascending."""
        numbers = self.versions()
        versions = self.read(numbers)
        found = ((versions.forest(number), versions.document(number)) for number in numbers)
        return [(forest, document.note) for forest, document in found if forest and document]

    def append(self, forest: Forest) -> bool:
        """Appends a version. False: somebody else was first; read again and try the next number."""
        base = None
        if forest.version:
            versions = Versions(self._documents)
            parent = versions.document(forest.version - 1)
            if parent is None:
                raise StoreError(
                    f"cannot append forest version {forest.version}", found="no version before it"
                )
            if is_large(forest):
                base = versions.base(base_of(forest.version))
            forest = dataclasses.replace(forest, parent=parent.hash)
        else:
            forest = dataclasses.replace(forest, parent=None)
        return self._documents.create(version_key(forest.version), body_of(forest, base))

    def pinned(self) -> list[int]:
        """Numbers of the pinned versions."""
        keys = [entry.key for entry in list_ours(self._storage, "pins/")]
        return sorted(version for version in in_parallel(self.read_pin, keys) if version is not None)

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


class Versions:
    """Versions of a forest, as they are read from its log: each document once."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._found: dict[int, Document | StoreError | None] = {}
        self._forests: dict[int, Forest] = {}

    def fetch(self, versions: Iterable[int]) -> None:
        """Reads the documents of some versions, those that were not read yet, many at a time."""
        unread = [version for version in versions if version not in self._found]
        self._found |= zip(unread, in_parallel(self._read, unread), strict=True)

    def document(self, version: int) -> Document | None:
        """The document of a version; None where there is none."""
        if version not in self._found:
            self._found[version] = self._read(version)
        found = self._found[version]
        if isinstance(found, StoreError):
            raise found
        return found

    def forest(self, version: int) -> Forest | None:
        """A version of the forest; None where there is none of that number.

        Raises:
            StoreError: it is damaged, or one that it builds on is, or was lost.
        """
        if version in self._forests:
            return self._forests[version]
        document, key = self.document(version), version_key(version)
        if document is None:
            return None
        with known_form(key):
            own, bases = version_key(document.body["version"]), bases_of(document.body)
        check_place(key, own)
        self.fetch(bases)
        base = self._base_of(document, version, bases[0]) if bases else None
        with known_form(key):
            forest = changed(base, document.body) if base else whole(document.body)
        self._forests[version] = forest
        return forest

    def hash(self, version: int) -> str:
        """The hash of a version's document; empty where there is none."""
        document = self.document(version)
        return document.hash if document is not None else ""

    def base(self, version: int) -> Base | None:
        """A version as one that another builds on; None where there is none."""
        forest, document = self.forest(version), self.document(version)
        return Base(forest, document.hash, bases_of(document.body)) if forest and document else None

    def _base_of(self, document: Document, version: int, base: int) -> Forest:
        forest, found, key = self.forest(base), self.document(base), version_key(base)
        if forest is None or found is None:
            raise MissingError(
                f"{key} is missing, and {version_key(version)} names only what it changes of that",
                remedy="restore it from a backup",
            )
        if found.hash != document.body.get("base_hash"):
            raise IntegrityError(
                f"{key} is not the version that {version_key(version)} changes",
                found=found.hash,
                expected=str(document.body.get("base_hash")),
                remedy="restore it from a backup",
            )
        return forest

    def _read(self, version: int) -> Document | StoreError | None:
        try:
            return self._documents.read(version_key(version))
        except StoreError as exc:
            return exc


def version_key(version: int) -> str:
    """The key of a version of the forest."""
    return f"forest/{version:06d}.json"
