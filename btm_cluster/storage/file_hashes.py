"""SHA-256 of large local files that are asked for again and again, such as a base's weights by every command:
remembered in this node's cache for as long as a file stays as it is."""

import hashlib
import os
from pathlib import Path

from btm_cluster.errors import StoreError, UserError
from btm_cluster.storage.node_cache import node_cache

SMALL_BYTES = 2**26
"""Smaller files are hashed in a blink, and not remembered."""


def sha256_of(file: Path) -> bytes:
    """The SHA-256 of a file's bytes: 32 bytes.

    A file counts as the same while its inode, size, and both times to the nanosecond are: any write
    moves the time of the last change, which no program can set back. Where the cache cannot be used, the file is read.
    """
    status = file.stat()
    if status.st_size < SMALL_BYTES:
        return _hash(file)
    seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    name = hashlib.sha256(f"{os.path.realpath(file)} {seen}".encode(errors="surrogateescape")).hexdigest()
    try:
        found = node_cache().get(f"sha256-{name}", lambda path: _write(path, _hash(file))).read_bytes()
    except (StoreError, UserError, OSError):
        return _hash(file)
    return found if len(found) == hashlib.sha256().digest_size else _hash(file)


def _hash(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _write(path: Path, digest: bytes) -> None:
    path.write_bytes(digest)
