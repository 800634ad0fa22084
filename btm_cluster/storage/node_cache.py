"""Files fetched from object storage, kept on this node: fetched once for all processes, bounded, oldest out first.

A file is named by its content's hash where its key is, so it never goes stale; whoever opens one checks it. Each node says
where and how much: BTM_CACHE_FOLDER (default: a folder of this user below the temporary one) and BTM_CACHE_GIGABYTES (50).
"""

import errno
import getpass
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from btm_cluster.errors import StoreError, UserError

DEFAULT_GIGABYTES = 50.0
IN_USE_SECONDS = 600.0
"""A file handed out this recently is not evicted: whoever asked for it is about to open it."""
_UNFINISHED = "fetching-"
_UNFINISHED_SECONDS = 86_400.0
"""An unfinished file this old was left by a process that died."""


class NodeCache:
    """A bounded folder of files by name, shared by the processes of a node."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes

    def get(self, name: str, fetch: Callable[[Path], None], anew: bool = False) -> Path:
        """The file called `name`, from here or by `fetch`, which writes to the path it is given. Others wait for it.

        Raises:
            StoreError: the disk is full even without what can be evicted, or cannot be written.
        """
        path = self.folder / "files" / name
        try:
            if not anew and _use(path):
                return path
            for folder in (path.parent, self.folder / "locks"):
                folder.mkdir(parents=True, exist_ok=True)
            # One of 256 locks: a lock's file cannot be deleted safely, so there must not be one for each name.
            with FileLock(self.folder / "locks" / name[-2:]):
                if anew:
                    path.unlink(missing_ok=True)
                elif _use(path):
                    return path
                self._fetch(path, fetch)
            self._evict(self.limit_bytes)
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                f"cannot keep a file in this node's cache {self.folder}",
                found=str(exc),
                remedy="free some disk space there, or set BTM_CACHE_FOLDER to a larger disk"
                if full
                else "set BTM_CACHE_FOLDER to a folder that can be written",
            ) from exc
        return path

    def drop(self, name: str) -> None:
        """Removes the file called `name`, if it is here."""
        (self.folder / "files" / name).unlink(missing_ok=True)

    def _fetch(self, path: Path, fetch: Callable[[Path], None]) -> None:
        unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            try:
                fetch(unfinished)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                unfinished.unlink(missing_ok=True)
                self._evict(0)
                fetch(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def _evict(self, limit_bytes: int) -> None:
        """Removes the files that were used longest ago until the rest fit, but none that is in use."""
        try:
            with FileLock(self.folder / "locks" / "eviction", timeout=0):
                self._remove_oldest(limit_bytes)
        except Timeout:
            pass  # another process is at it

    def _remove_oldest(self, limit_bytes: int) -> None:
        now = time.time()
        files = []
        for file in os.scandir(self.folder / "files"):
            try:
                stat = file.stat()
            except FileNotFoundError:
                continue
            kept_for = _UNFINISHED_SECONDS if file.name.startswith(_UNFINISHED) else IN_USE_SECONDS
            files.append((stat.st_mtime, stat.st_size, file.path, now - stat.st_mtime > kept_for))
        total = sum(size for _, size, _, _ in files)
        for _, size, path, may_go in sorted(files):
            if total <= limit_bytes:
                return
            if may_go:
                Path(path).unlink(missing_ok=True)
                total -= size


def node_cache() -> NodeCache:
    """This node's cache, as its environment says.

    Raises:
        UserError: BTM_CACHE_GIGABYTES is no positive number.
    """
    folder = os.environ.get("BTM_CACHE_FOLDER") or Path(tempfile.gettempdir(), f"btm-cluster-cache-{getpass.getuser()}")
    given = os.environ.get("BTM_CACHE_GIGABYTES") or str(DEFAULT_GIGABYTES)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise UserError("BTM_CACHE_GIGABYTES is no size", found=given, expected="a positive number, such as 50")
    return NodeCache(Path(folder), int(gigabytes * 1e9))


def _use(path: Path) -> bool:
    """Whether the file is there; marks it as used now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
