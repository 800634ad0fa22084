"""The storage port: a few operations on keys and bytes.

Knows nothing of artifacts. The adapters (a local folder; object storage) pass one contract suite. Keys are
relative paths with `/`. The only operation that decides a race is `create`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from btm_cluster.errors import StoreError


@dataclass(frozen=True)
class Entry:
    """A stored object as a listing shows it."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since 1970 when it was last written, by the store's clock."""


class Storage(Protocol):
    """A flat space of keys. Every failure is a StoreError; a key that is not there is a MissingError."""

    location: str
    """The argument with which `open_storage` opens this store again, in another process."""

    @property
    def copies_bytes(self) -> int:
        """Bytes of objects that this node keeps copies of, at most; 0 where `download` copies nothing."""

    def check(self) -> None:
        """Refuses, at once, a store that cannot be used: no such bucket, wrong credentials, no folder.

        Raises:
            UserError: naming which, and the remedy.
            StoreError: it is out, for longer than any operation waits for it.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object if the key is free, atomically. False: it was taken, and stays as it is."""

    def upload(self, key: str, path: Path, keep: bool = True) -> None:
        """Writes the file at `path`, atomically, over what is there: for keys that name their content.

        Without `keep` the caller never changes the file again: it may become the object instead of being copied.
        """

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        """The object's bytes from `start`, at most `size` of them."""

    def download(self, key: str, anew: bool = False) -> Path:
        """A local file with the object's bytes, to be read only; `anew`
        fetches it even where the node has it."""

    def size(self, key: str) -> int:
        """Bytes of the object, without reading it."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, by key, whatever its name.

        A link counts as one, and is not followed.
        """

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        """Unfinished writes below `prefix`, a folder: no objects yet, or never. For `discard` alone."""

    def discard(self, key: str) -> None:
        """Removes what `unfinished` listed. Who is still writing it begins anew."""

    def delete(self, key: str) -> None:
        """Removes the object, if it is there. A link is removed, and never followed."""

    def erase_object(self, key: str) -> None:
        """Removes the object, if it is there, all versions that the store keeps of it, and this node's copy."""

    def erase(self, prefix: str) -> None:
        """Removes every object whose key starts with `prefix`, all versions that the
        store keeps of it, and this node's copies.

        Of a folder also what is unfinished in it.
        """

    def address(self, key: str) -> str:
        """Where a program that knows nothing of this port finds the object: a path, or s3://bucket/key."""


def check_key(verb: str, key: str) -> None:
    """Refuses a key that would lead out of the store, or that no store can have."""
    if key.startswith("/") or ".." in key.split("/") or "\0" in key:
        raise StoreError(f"cannot {verb} {key!r}", expected="a relative key without ..")


def check_prefix(verb: str, prefix: str) -> None:
    """Refuses a prefix that would lead out of the store, or name all of it."""
    check_key(verb, prefix)
    if not prefix.strip("/"):
        raise StoreError(f"cannot {verb} a whole store", expected="a prefix")
