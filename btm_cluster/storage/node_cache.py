"""Files fetched from object storage, kept on this node: fetched once for all processes, bounded, oldest out first.

A file is named by its content's hash where its key is, so it never goes stale; whoever opens one checks it. Each node says
where and how much: BTM_CACHE_FOLDER (default: a folder of this user below the temporary one) and BTM_CACHE_GIGABYTES (50).

The folder is looked through only when a running count of its bytes passes the limit, and once a day. The count is raised
before a file appears, so it is rather too high (a file fetched twice or deleted by hand), which costs a look at most; only what
a process leaves behind that is killed while it fetches has to wait for the day's look.
"""

import errno
import getpass
import os
import re
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
FREED_SHARE = 0.1
"""Of the limit, that eviction leaves free, so that not each further file needs one."""
COUNT_POLL_SECONDS = 0.001
"""The count is held for a fraction of that; filelock's own interval, 50 ms, is longer than most fetches."""
_UNKNOWN_BYTES = 10**18
"""Counted while nobody has looked: more than any limit."""
_COUNT = re.compile(rb"(\d{20}) (\d{12})\n")
"""Bytes, and when the folder was last looked through, in seconds since 1970. Of one length, so that it is written in place."""


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
                counted, looked = self._fetch(path, fetch)
            if counted > self.limit_bytes or time.time() - looked > _UNFINISHED_SECONDS:
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

    def _fetch(self, path: Path, fetch: Callable[[Path], None]) -> tuple[int, float]:
        unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            try:
                count = self._fetch_counted(unfinished, fetch)
            except OSError as exc:
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                unfinished.unlink(missing_ok=True)
                self._evict(0)
                count = self._fetch_counted(unfinished, fetch)
            unfinished.replace(path)
            return count
        finally:
            unfinished.unlink(missing_ok=True)

    def _fetch_counted(self, unfinished: Path, fetch: Callable[[Path], None]) -> tuple[int, float]:
        fetch(unfinished)
        return self._count(unfinished.stat().st_size)

    def _count(self, added: int, looked: float | None = None) -> tuple[int, float]:
        """Adds to the count of bytes, sets when the folder was last looked through if given, and returns both."""
        path = self.folder / "count"
        lock = FileLock(self.folder / "locks" / "count", poll_interval=COUNT_POLL_SECONDS)
        with lock, open(path, "r+b" if path.exists() else "w+b", 0) as file:
            known = _COUNT.fullmatch(file.read())
            counted, last_look = (int(known[1]), float(known[2])) if known else (_UNKNOWN_BYTES, 0.0)
            counted, last_look = max(counted + added, 0), last_look if looked is None else looked
            if added or looked is not None or not known:
                file.seek(0)
                file.write(b"%020d %012d\n" % (counted, last_look))
                file.truncate()
        return counted, last_look

    def _evict(self, limit_bytes: int) -> None:
        """Removes the files that were used longest ago until the rest fit and some room is free, but none that is in use."""
        try:
            with FileLock(self.folder / "locks" / "eviction", timeout=0):
                before, _ = self._count(0)
                left = self._remove_oldest(limit_bytes)
                self._count(left - before, looked=time.time())  # what others add meanwhile stays counted
        except Timeout:
            pass  # another process is at it

    def _remove_oldest(self, limit_bytes: int) -> int:
        """Returns how many bytes are left."""
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
        if total <= limit_bytes:
            return total
        for _, size, path, may_go in sorted(files):
            if total <= (1 - FREED_SHARE) * limit_bytes:
                break
            if may_go:
                Path(path).unlink(missing_ok=True)
                total -= size
        return total


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
