"""A store in a local folder.

Objects appear whole or not at all: a temporary file beside the target, flushed to disk, then linked (create) or renamed
(upload) into place. Both are atomic on a POSIX file system, and a link to an existing name fails, which decides races.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from btm_cluster.errors import MissingError, StoreError, UserError
from btm_cluster.storage.port import Entry, check_key, check_prefix
from btm_cluster.storage.requests import DONE, FAILED, count_request

JOBS_COPY = "/runtime_resources/working_dir_files/"
"""Part of every path in what Ray unpacks of a job's working directory."""
_TEMPORARY = ".writing-"
Result = TypeVar("Result")


class LocalFolder:
    """Adapter of the storage port for a folder."""

    def __init__(self, location: str) -> None:
        self.location = str(Path(location).expanduser().absolute())
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
        if JOBS_COPY in self.location:
            raise UserError(
                f"what is written to {self.location} would be lost",
                found="a folder in this Ray job's own copy of its working directory, which goes when the job ends",
                expected="a bucket, or the absolute path of a folder that all nodes share",
                remedy="choose another place",
            )
        if found:
            raise UserError(
                f"the store {self.location[:200]} cannot be a folder",
                found=found,
                expected="a folder, or a place for one",
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
                _flush_folder(target.parent)
                return True
            finally:
                temporary.unlink(missing_ok=True)

        return self._attempt("create", key, write)

    def upload(self, key: str, path: Path) -> None:
        def write(target: Path) -> None:
            temporary = _temporary_beside(target)
            try:
                shutil.copyfile(path, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(target)
                _flush_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

        self._attempt("upload", key, write)

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        def read(path: Path) -> bytes:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)

        return self._attempt("read", key, read)

    def download(self, key: str, anew: bool = False) -> Path:  # noqa: ARG002 - the folder is the source itself
        def stat(path: Path) -> Path:
            path.stat()
            return path

        return self._attempt("download", key, stat)

    def list(self, prefix: str) -> Iterator[Entry]:
        # Only the folder that the prefix names is walked, not the whole store.
        start = self._root / prefix.rpartition("/")[0]
        outcome = FAILED
        try:
            paths = (Path(folder, name) for folder, _, names in walk(start) for name in names)
            plain = (path for path in paths if not path.name.startswith(_TEMPORARY))
            found = {key: path for path in plain if (key := path.relative_to(self._root).as_posix()).startswith(prefix)}
            entries = [_entry(key, found[key]) for key in sorted(found)]
            outcome = DONE
        except OSError as exc:
            raise self._failed("list", prefix, exc) from exc
        finally:
            count_request("list", outcome)
        yield from filter(None, entries)

    def delete(self, key: str) -> None:
        self._attempt("delete", key, lambda path: path.unlink(missing_ok=True))

    def erase(self, prefix: str) -> None:
        check_prefix("erase", prefix)
        if prefix.endswith("/"):  # with what is no object: empty folders, links, files half written
            self._attempt("erase", prefix, _remove_folder)
        for entry in self.list(prefix):
            self.delete(entry.key)

    def address(self, key: str) -> str:
        return str(self._root / key)

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
            count_request(verb, outcome)

    def _failed(self, verb: str, key: str, exc: OSError) -> StoreError:
        remedy = "free some disk space" if exc.errno == errno.ENOSPC else "check the folder and its permissions"
        return StoreError(f"cannot {verb} {key} in {self.location}", found=str(exc), remedy=remedy)


def walk(start: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk`, but what cannot be read raises its OSError instead of counting as empty; what is not there is empty."""

    def refuse(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError):
            raise exc

    return os.walk(start, onerror=refuse)


def _entry(key: str, path: Path) -> Entry | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None  # deleted while we listed
    return Entry(key, stat.st_size, stat.st_mtime)


def _temporary_beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"


def _remove_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
