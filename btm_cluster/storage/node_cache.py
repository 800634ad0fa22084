"""Files fetched from object storage, kept on this node: fetched once for all
processes, bounded, oldest out first.

A file is named by its content's hash where its key is, so it never goes stale; whoever opens one checks it.
Each node says where and how much: BTM_CACHE_FOLDER (default: a folder of this user below the temporary one)
and BTM_CACHE_GIGABYTES (50).

Others may write to the temporary folder too, so the cache is this user's alone and no link in it is followed.

When a file was last used is said by an empty one of its name in `used`: its own times stay those of its bytes.

The folder is looked through only when a running count of its bytes passes the limit, and once a day. The
count is raised before a file appears, so it is rather too high (a file fetched twice or deleted by hand),
which costs a look at most; only what a process leaves behind that is killed while it fetches has to wait for
the day's look.
"""

import errno
import fcntl
import os
import pwd
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from btm_cluster.errors import StoreError, UserError
from btm_cluster.storage.account import account

DEFAULT_GIGABYTES = 50.0
PRIVATE = 0o700
IN_USE_SECONDS = 600.0
"""A file handed out this recently is not evicted: whoever asked for it is about to open it."""
_UNFINISHED = "fetching-"
_UNFINISHED_SECONDS = 86_400.0
"""An unfinished file this old was left by a process that died."""
FREED_SHARE = 0.1
"""Share of the limit that eviction leaves free, so that not each further file needs one."""
_UNKNOWN_BYTES = 10**18
"""Counted while nobody has looked: more than any limit."""
_COUNT = re.compile(rb"(\d{20}) (\d{12})\n")
"""Bytes, and when the folder was last looked through, in seconds since 1970.

Of one length, so that it is written in place.
"""


class NodeCache:
    """A bounded folder of files by name, shared by the processes of a node and one user."""

    def __init__(self, folder: Path, limit_bytes: int, was_named: bool = False) -> None:
        """`was_named`: the user said which folder.

        It may then be a link, or a volume of root's that many may write to.
        """
        self.folder, self.limit_bytes, self._was_named = folder, limit_bytes, was_named

    def check(self) -> None:
        """Refuses a folder that another user has prepared or can change; makes none.

        Raises:
            UserError: naming the folder, and the remedy.
        """
        _check_private(self.folder, self._was_named)
        for below in ("files", "used", "locks", "compiled"):
            _check_private(self.folder / below)

    def folder_for_code(self) -> Path:
        """Where torch.compile may keep what it compiles: its own default, below the
        temporary folder, others may prepare.

        Raises:
            UserError: they have.
            StoreError: it cannot be written.
        """
        try:
            self._make("compiled")
        except OSError as exc:
            raise self._failed(exc) from exc
        return self.folder / "compiled"

    def _make(self, *below: str) -> None:
        self.check()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for made in (self.folder, *(self.folder / name for name in below)):
            made.mkdir(exist_ok=True, mode=PRIVATE)
        self.check()  # of two users who make it at once, one is first

    def get(self, name: str, fetch: Callable[[Path], None], anew: bool = False) -> Path:
        """The file called `name`, from here or by `fetch`, which writes to the path it is given.

        Others wait for it.

        Raises:
            StoreError: the disk is full even without what can be evicted, or cannot be written.
        """
        path = self.folder / "files" / name
        try:
            if not anew and self.find(name):
                return path
            self._make("files", "used", "locks")
            # One of 256 locks: a lock's file cannot be deleted safely, so there must not be one for each name.
            with FileLock(self.folder / "locks" / name[-2:]):
                if anew:
                    path.unlink(missing_ok=True)
                elif self._find(name):
                    return path
                counted, looked = self._fetch(path, fetch)
            if counted > self.limit_bytes or time.time() - looked > _UNFINISHED_SECONDS:
                self._evict(self.limit_bytes)
        except OSError as exc:
            raise self._failed(exc) from exc
        return path

    def find(self, name: str) -> Path | None:
        """The file called `name`, used now; None where it is not here. What is no file is none, and is replaced."""
        self.check()
        return self._find(name)

    def _find(self, name: str) -> Path | None:
        path = self.folder / "files" / name
        with suppress(FileNotFoundError):
            if stat.S_ISREG(path.lstat().st_mode):
                _touch(self.folder / "used" / name)
                return path
        return None

    def drop(self, name: str) -> None:
        """Removes the file called `name`, if it is here."""
        for folder in ("files", "used"):
            (self.folder / folder / name).unlink(missing_ok=True)

    def _failed(self, exc: OSError) -> StoreError:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        return StoreError(
            f"cannot keep a file in this node's cache {self.folder}",
            found=str(exc),
            remedy="free some disk space there, or set BTM_CACHE_FOLDER to a larger disk"
            if full
            else "set BTM_CACHE_FOLDER to a folder that can be written",
        )

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
        """Adds to the count of bytes, sets when the folder was last looked
        through if given, and returns both."""
        path = self.folder / "count"
        with open(path, "r+b", 0, opener=_open_own) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            known = _COUNT.fullmatch(file.read())
            counted, last_look = (int(known[1]), float(known[2])) if known else (_UNKNOWN_BYTES, 0.0)
            counted, last_look = max(counted + added, 0), last_look if looked is None else looked
            if added or looked is not None or not known:
                file.seek(0)
                file.write(b"%020d %012d\n" % (counted, last_look))
                file.truncate()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not, while a process forked meanwhile has it open
        return counted, last_look

    def _evict(self, limit_bytes: int) -> None:
        """Removes the files that were used longest ago until the rest fit and some
        room is free, but none that is in use."""
        try:
            with FileLock(self.folder / "locks" / "eviction", timeout=0):
                before, _ = self._count(0)
                left = self._remove_oldest(limit_bytes)
                self._count(left - before, looked=time.time())  # what others add meanwhile stays counted
        except Timeout:
            pass  # another process is at it

    def _remove_oldest(self, limit_bytes: int) -> int:
        """Returns how many bytes are left."""
        now, used = time.time(), _listed(self.folder / "used")
        files = []
        for name, found in _listed(self.folder / "files").items():
            kept_for = _UNFINISHED_SECONDS if name.startswith(_UNFINISHED) else IN_USE_SECONDS
            last = max(status.st_mtime for status in (found, used.pop(name, found)))
            files.append((last, found.st_size, name, now - last > kept_for))
        for name in used:  # of files that are gone
            (self.folder / "used" / name).unlink(missing_ok=True)
        total = sum(size for _, size, _, _ in files)
        if total <= limit_bytes:
            return total
        for _, size, name, may_go in sorted(files):
            if total <= (1 - FREED_SHARE) * limit_bytes:
                break
            if may_go:
                self.drop(name)
                total -= size
        return total


def node_cache() -> NodeCache:
    """This node's cache, as its environment says.

    Raises:
        UserError: BTM_CACHE_GIGABYTES is no positive number.
    """
    named = os.environ.get("BTM_CACHE_FOLDER")
    folder = named or Path(tempfile.gettempdir(), f"btm-cluster-cache-{account()}")
    given = os.environ.get("BTM_CACHE_GIGABYTES") or str(DEFAULT_GIGABYTES)
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise UserError(
            "BTM_CACHE_GIGABYTES is no size", found=given, expected="a positive number, such as 50"
        )
    return NodeCache(Path(folder), int(gigabytes * 1e9), was_named=bool(named))


def _listed(folder: Path) -> dict[str, os.stat_result]:
    """The files of a folder by name, but for those that are deleted meanwhile."""
    found = {}
    for file in os.scandir(folder):
        with suppress(FileNotFoundError):
            found[file.name] = file.stat(follow_symlinks=False)
    return found


def _touch(path: Path) -> None:
    """Sets a file's time to now, and makes it, empty, where it is not there."""
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        path.parent.mkdir(exist_ok=True, mode=PRIVATE)  # earlier versions made none
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _open_own(path: str, flags: int) -> int:
    """Opens a file of ours for reading and writing, and makes it where it is not
    there; never what a link leads to."""
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_uid != os.geteuid():
        os.close(descriptor)
        raise OSError(errno.EPERM, "not a plain file of ours", path)
    return descriptor


def _check_private(folder: Path, was_named: bool = False) -> None:
    """Refuses a folder that is a link, another user's, or that others may write to.

    One that is not there is well.
    """
    try:
        found = folder.stat() if was_named else folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(found.st_mode):
        wrong = "a symbolic link"
    elif found.st_uid != os.geteuid() and not (was_named and found.st_uid == 0):
        wrong = f"a folder of the user {_user(found.st_uid)}"
    elif not was_named and stat.S_ISDIR(found.st_mode) and _is_open(found.st_mode):
        wrong = f"mode {stat.S_IMODE(found.st_mode):04o}, so that others can write to it"
    else:
        return
    raise UserError(
        f"this node's cache {folder} may have been prepared by another user",
        found=wrong,
        expected="a folder of ours that nobody else can write to, or none",
        remedy="set BTM_CACHE_FOLDER to a folder of your own, or remove this one",
    )


def _is_open(mode: int) -> bool:
    """Whether others can replace what lies in a folder: the sticky bit keeps them from that."""
    return bool(mode & (stat.S_IWGRP | stat.S_IWOTH)) and not mode & stat.S_ISVTX


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
