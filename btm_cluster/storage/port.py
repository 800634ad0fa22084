"""What a store must do: six operations on keys and bytes.

Knows nothing of artifacts. The adapters (a local folder; object storage) pass one contract suite. Keys are relative
paths with `/`. The only operation that decides a race is `create`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """A stored object as a listing shows it."""

    key: str
    size_bytes: int


class Storage(Protocol):
    """A flat space of keys. Every failure is a StoreError; a key that is not there is a MissingError."""

    location: str
    """What `open_storage` takes to open this store again, in another process."""

    def create(self, key: str, data: bytes) -> bool:
        """Writes a small object if the key is free, atomically. False: it was taken, and stays as it is."""

    def upload(self, key: str, path: Path) -> None:
        """Writes the file at `path`, atomically, over what is there: for keys that name their content."""

    def read(self, key: str) -> bytes:
        """The whole object."""

    def download(self, key: str) -> Path:
        """A local file with the object's bytes, to be read only."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object whose key starts with `prefix`, by key."""

    def delete(self, key: str) -> None:
        """Removes the object, if it is there."""
