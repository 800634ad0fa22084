"""Folders on this machine's disk for files that are about to be stored.

Gone when their owner is done, or was killed.

A killed process cannot clean up. Each folder therefore names its process and machine, and the process holds a
lock on it, which ends with the process; whoever opens the next folder removes those that nobody holds. The
number alone would not do: in a container that starts again it is the same, and in one that shares the
temporary folder it says nothing.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from btm_cluster.errors import StoreError

_PREFIX = "btm-scratch-"
_YOUNG_SECONDS = 60.0
"""Younger folders are left alone: their owner may be about to lock them."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the temporary one.

    Raises:
        StoreError: its disk is full; what was stored before stays.
    """
    try:
        remove_abandoned()
        with (
            tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{_host()}-{os.getpid()}-") as scratch,
            _held(scratch),
        ):
            yield Path(scratch)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"the disk below {tempfile.gettempdir()} is full, where a step keeps what it is about to store",
            found=str(exc),
            remedy="free some disk space there, or set TMPDIR to a larger disk; the same command goes on",
        ) from exc


def remove_abandoned() -> None:
    """Removes this user's scratch folders on this machine whose process is gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}{_host()}-*"):
        with _held(str(folder)) as lock:
            if lock is None:
                continue
            found = os.fstat(lock)
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _YOUNG_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def is_in_scratch(file: Path) -> bool:
    """Whether a file is a step's own, in a scratch folder, and not a link to somebody else's."""
    return not file.is_symlink() and any(folder.name.startswith(_PREFIX) for folder in file.parents)


def link_if_alike(file: Path, place: Path) -> bool:
    """Gives a file a second name, which spares its copy, and says whether it did.

    It must be on the disk of `place`, with the owner, permissions and access list of a file that is made there.
    """
    place.touch()
    try:
        if _access(file) == _access(place):
            place.unlink()
            os.link(file, place)
            os.utime(place)  # a collection spares what is new, as it would a copy
            return True
    except (OSError, AttributeError):  # this file system has no links, or this system no access lists
        pass
    return False


def on_disk_of(place: Path, file: Path) -> bool:
    """Whether a file is on the disk of a folder, or where that would be made."""
    there = next(path for path in (place, *place.parents) if path.exists())
    return there.stat().st_dev == file.stat().st_dev


@contextmanager
def flushed_meanwhile(files: Iterable[Path]) -> Iterator[None]:
    """Has files written to the disk while others read them, so that who waits for that later waits less.

    Raises:
        StoreError: the disk did not take one. The system says so once: who waits later would not hear of it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as pool:
        flushed = [(file, pool.submit(flush, file)) for file in files]
        yield
    for file, done in flushed:
        try:
            done.result()
        except OSError as exc:
            raise StoreError(
                f"the disk did not take {file.name}, which is about to be stored",
                found=str(exc),
                remedy="look at the disk and what it has free; the same command goes on",
            ) from exc


def flush(file: Path) -> None:
    """Waits until the disk has a file, or what a folder lists."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _access(file: Path) -> tuple[object, ...]:
    found = file.stat()
    attributes = {name: os.getxattr(file, name) for name in os.listxattr(file)}
    return found.st_dev, found.st_uid, found.st_gid, found.st_mode, attributes


@contextmanager
def _held(folder: str) -> Iterator[int | None]:
    """A descriptor of a folder whose lock is held meanwhile, at most until the process ends.

    None for one that is another's, that is gone or a link, or whose disk has no locks.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor if _locks(descriptor) else None
    finally:
        os.close(descriptor)


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _host() -> str:
    return re.sub("[^A-Za-z0-9.]", "_", socket.gethostname())
