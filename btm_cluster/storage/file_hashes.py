"""Digests of large local files that are read again and again, such as a base's weights by every command: remembered in
this node's cache for as long as a file stays as it is.

A file counts as the same while its inode, size, and both times to the nanosecond are: a write moves the time of the
last change, which no program can set back. Not noticed are bytes that a disk changes by itself, and those that a
program writes again into a page of a shared mapping before the system has written that page back.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from btm_cluster.errors import StoreError, UserError
from btm_cluster.storage.node_cache import node_cache

SMALL_BYTES = 2**26
"""Smaller files are hashed in a blink, and not remembered."""
SETTLED_SECONDS = 2.0
"""A file that was changed so shortly before it was read may be changed again without another time: file systems count
in steps of up to two seconds."""


class FoundFile:
    """A local file as it was found, before its bytes are read.

    Raises:
        FileNotFoundError: it is not there.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._began = file, time.time()
        with file.open("rb") as opened:  # on a network's disk, opening asks for the present status
            self._status = os.fstat(opened.fileno())
        self.is_large = self._status.st_size >= SMALL_BYTES
        """Whether its digests are remembered."""

    def is_same(self) -> bool:
        """Whether the file is still as it was found."""
        try:
            return _marks(self._file.stat()) == _marks(self._status)
        except FileNotFoundError:
            return False

    def recall(self, kind: str) -> bytes | None:
        """The file's digest of this kind; None where none is remembered."""
        if not self.is_large:
            return None
        try:
            known = node_cache().find(self._name(kind))
            return known.read_bytes() if known else None
        except (StoreError, UserError, OSError):
            return None

    def remember(self, kind: str, digest: bytes) -> None:
        """Remembers what was made of bytes that were read since the file was found, where they are the file's still."""
        with suppress(FileNotFoundError):  # gone meanwhile
            self.make(kind, lambda _: digest)

    def make(self, kind: str, make: Callable[[Path], bytes], expected: bytes | None = None) -> bytes:
        """The file's digest of this kind, which `make` makes of it where it is not remembered.

        Other processes wait for it. One that is not as `expected` is not remembered: it may have been misread.
        Where the cache cannot be used, the file is read.

        Raises:
            FileNotFoundError: it is gone.
        """
        if not self.is_large:
            return make(self._file)
        made: list[bytes] = []

        def write(path: Path) -> None:
            made.append(make(self._file))
            if not self._is_settled() or expected not in (None, made[-1]):
                raise StoreError(f"{self._file} is being changed, or is not what it should be")
            try:
                path.write_bytes(made[-1])
            except OSError as exc:  # a full disk: the cache would be emptied for these bytes
                raise StoreError(f"the digest of {self._file} cannot be kept") from exc

        try:
            return node_cache().get(self._name(kind), write).read_bytes()
        except (StoreError, UserError, OSError):
            return made[-1] if made else make(self._file)

    def _is_settled(self) -> bool:
        """Whether a change of the file since it was found would show."""
        return self.is_same() and self._status.st_ctime < self._began - SETTLED_SECONDS

    def _name(self, kind: str) -> str:
        seen = f"{os.path.realpath(self._file)} {_marks(self._status)}"
        return f"{kind}-{hashlib.sha256(seen.encode(errors='surrogateescape')).hexdigest()}"


def sha256_of(file: Path) -> bytes:
    """The SHA-256 of a file's bytes: 32 bytes.

    Raises:
        FileNotFoundError: it is not there.
    """
    found = FoundFile(file).make("sha256", _hash)
    return found if len(found) == hashlib.sha256().digest_size else _hash(file)


def _hash(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _marks(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
