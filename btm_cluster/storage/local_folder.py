"""A store in a local folder.

Objects appear whole or not at all: a temporary file beside the target, flushed to disk, then linked (create)
or renamed (upload) into place. Both are atomic on a POSIX file system, and a link to an existing name fails,
which decides races. A folder of the store's own, such as `blobs`, may be a link to another disk. No other
link is followed by listing or deleting.
"""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from btm_cluster.errors import MissingError, StoreError, UserError
from btm_cluster.storage.port import Entry, check_key, check_prefix
from btm_cluster.storage.scratch import flush, link_if_alike
from btm_cluster.storage.store_calls import DONE, FAILED, count_store_call

_TEMPORARY = ".writing-"
_UNFINISHED = re.compile(rf"{re.escape(_TEMPORARY)}[0-9a-f]{{32}}")
_IN_THE_WAY = (
    "move it out of the store, and restore what belongs there from a backup or by running the plan again"
)
_REMEDIES = {errno.ENOSPC: "free some disk space", errno.EISDIR: _IN_THE_WAY, errno.ELOOP: _IN_THE_WAY}
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
Result = TypeVar("Result")


class LocalFolder:
    """Adapter of the storage port for a folder."""

    copies_bytes = 0

    def __init__(self, location: str) -> None:
        try:
            self.location = str(Path(location).expanduser().absolute())
        except RuntimeError as exc:  # an account without a home
            raise UserError(
                f"cannot use the store {location}", found=str(exc), remedy="set HOME, or write the path out"
            ) from exc
        self._root = Path(self.location)

    def check(self) -> None:
        """Refuses a store that is a file, would lie below one, or has a name that no folder can have."""
        found = ""
        existing = next(path for path in (self._root, *self._root.parents) if os.path.lexists(path))
        if not existing.is_dir():
            found = f"{existing}, which is no folder"
        try:
            self._root.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # not there yet, or named above
        except OSError as exc:
            found = found or str(exc)[:200]
        if found:
            raise UserError(
                f"the store {self.location[:200]} cannot be a folder",
                found=found,
                expected="a folder, or a path where one can be made",
                remedy="choose another `store`",
            )

    def create(self, key: str, data: bytes) -> bool:
        def write(target: Path) -> bool:
            temporary = _temporary_beside(target)
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                flush(target.parent)
                return True
            finally:
                temporary.unlink(missing_ok=True)

        return self._attempt("create", key, partial(_again_if_discarded, write))

    def upload(self, key: str, path: Path, keep: bool = True) -> None:
        def write(target: Path) -> None:
            temporary = _temporary_beside(target)
            try:
                if keep or not link_if_alike(path, temporary):
                    shutil.copyfile(path, temporary)
                flush(temporary)
                temporary.replace(target)
                flush(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

        self._attempt("upload", key, partial(_again_if_discarded, write))

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        def read(path: Path) -> bytes:
            with _open(path) as file:
                file.seek(start)
                left = max(0, os.fstat(file.fileno()).st_size - start)
                return file.read(left if size is None else min(size, left))

        return self._attempt("read", key, read)

    def download(self, key: str, anew: bool = False) -> Path:  # noqa: ARG002 - the folder is the source itself
        def find(path: Path) -> Path:
            _open(path).close()
            return path

        return self._attempt("download", key, find)

    def size(self, key: str) -> int:
        return self._attempt("look up", key, lambda path: _check_file(path, path.stat()).st_size)

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from (entry for entry in self._entries(prefix) if not _is_temporary(entry.key))

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        check_prefix("list", prefix)
        yield from (
            entry for entry in self._entries(prefix) if _UNFINISHED.fullmatch(entry.key.rpartition("/")[2])
        )

    def discard(self, key: str) -> None:
        self.delete(key)

    def _entries(self, prefix: str) -> Iterator[Entry]:
        # Only the folder that the prefix names is walked, not the whole store.
        start = self._root / prefix.rpartition("/")[0]
        outcome = FAILED
        try:
            paths = () if self._is_behind_link(start / "any name") else _files_and_links(start)
            found = {
                key: path
                for path in paths
                if (key := path.relative_to(self._root).as_posix()).startswith(prefix)
            }
            entries = [_entry(key, found[key]) for key in sorted(found)]
            outcome = DONE
        except OSError as exc:
            raise self._failed("list", prefix, exc) from exc
        finally:
            count_store_call("list", outcome)
        yield from filter(None, entries)

    def delete(self, key: str) -> None:
        def remove(path: Path) -> None:
            try:
                if not self._is_behind_link(path):
                    path.unlink(missing_ok=True)
            except OSError as exc:
                if exc.errno not in _NOTHING_THERE:
                    raise

        self._attempt("delete", key, remove)

    def erase_object(self, key: str) -> None:
        self.delete(key)

    def erase(self, prefix: str) -> None:
        check_prefix("erase", prefix)
        if prefix.endswith("/"):  # with what is no object: empty folders, links, files half written
            self._attempt("erase", prefix, self._remove_folder)
        for entry in self.list(prefix):
            self.delete(entry.key)

    def address(self, key: str) -> str:
        return str(self._root / key)

    def _remove_folder(self, folder: Path) -> None:
        if self._is_behind_link(folder):
            return
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)

    def _is_behind_link(self, path: Path) -> bool:
        """Whether a folder above it is a link.

        Those right below the root may be: they can lie on other disks.
        """
        above = list(path.relative_to(self._root).parents)[:-2]
        return any((self._root / folder).is_symlink() for folder in above)

    def _attempt(self, verb: str, key: str, act: Callable[[Path], Result]) -> Result:
        check_key(verb, key)
        outcome = DONE
        try:
            return act(self._root / key)
        except FileNotFoundError as exc:
            raise MissingError(
                f"cannot {verb} {key}", found="no such object", expected=f"one in {self.location}"
            ) from exc
        except OSError as exc:
            outcome = FAILED
            raise self._failed(verb, key, exc) from exc
        finally:
            count_store_call(verb, outcome)

    def _failed(self, verb: str, key: str, exc: OSError) -> StoreError:
        remedy = _REMEDIES.get(exc.errno or 0, "check the folder and its permissions")
        return StoreError(f"cannot {verb} {key} in {self.location}", found=str(exc), remedy=remedy)


def walk(start: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, but what cannot be read raises its OSError instead of counting as empty.

    What is no folder is empty.
    """

    def refuse(exc: OSError) -> None:
        if exc.errno not in _NOTHING_THERE:
            raise exc

    return os.walk(start, onerror=refuse)


def _files_and_links(start: Path) -> Iterator[Path]:
    for folder, folders, names in walk(start):
        yield from (Path(folder, name) for name in names)
        yield from (path for path in (Path(folder, name) for name in folders) if path.is_symlink())


def _entry(key: str, path: Path) -> Entry | None:
    """None for what was deleted while we listed.

    A link is listed as it is: whoever reads it hears where it does not lead.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return Entry(key, found.st_size, found.st_mtime)


def _again_if_discarded(write: Callable[[Path], Result], target: Path) -> Result:
    """Writes anew where the temporary file, or its folder, was discarded
    meanwhile as what a killed process had left."""
    for _ in range(2):
        try:
            return write(target)
        except FileNotFoundError:
            continue
    return write(target)


def _open(path: Path) -> BinaryIO:
    """Opens a file.

    A pipe would wait for a writer, and a device might never end: both are refused, as a folder is.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_file(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_file(path: Path, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        raise IsADirectoryError(
            errno.EISDIR, "a folder, pipe or device, where an object should be", str(path)
        )
    return found


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(_TEMPORARY)


def _temporary_beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
