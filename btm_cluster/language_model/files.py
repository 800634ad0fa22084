"""Files of text, local and in S3: found by path or glob, opened through `pyarrow.fs`, which undoes compression.

Region, endpoint and credentials of S3 come from the standard AWS_* environment variables. Knows nothing of documents.
"""

import fnmatch
import glob
import io
import os
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow
import pyarrow.fs

from btm_cluster.errors import TextError

_S3 = "s3://"
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class SourceFile(NamedTuple):
    """A file of a source, and what tells that it has changed."""

    path: str
    size_bytes: int
    modified_ns: int


def find_files(pattern: str) -> list[SourceFile]:
    """The files that a path or glob names, by path; empty if there are none. `**` does not follow links to folders.

    Raises:
        OSError, pyarrow.ArrowException: a bucket that cannot be listed.
    """
    found = _find_remote(pattern) if pattern.startswith(_S3) else _find_local(pattern)
    return sorted(set(found))


def find_below(folder: Path) -> list[SourceFile]:
    """Every file below a local folder, but for hidden ones."""
    return find_files(f"{glob.escape(str(folder))}/**")


class Budget:
    """How many bytes, decompressed, may still be read of a source that is not trusted."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = self._left = most_bytes

    def spend(self, path: str, size_bytes: int) -> None:
        """Counts what was read.

        Raises:
            TextError: it was too much.
        """
        self._left -= size_bytes
        if self._left < 0:
            raise TextError(
                "a text is larger than it may be",
                found=f"more than {self._most_bytes:,} bytes, decompressed, up to {path}",
                expected=f"at most {self._most_bytes:,}",
                remedy="cut it into several domains, or raise `expansion.inbox.most_decompressed_gigabytes`",
            )


class _Counted(io.RawIOBase):
    """A stream that spends a budget."""

    def __init__(self, path: str, raw: Any, budget: Budget) -> None:
        self._path, self._raw, self._budget = path, raw, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._raw.readinto(buffer))
        self._budget.spend(self._path, size)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_stream(path: str, budget: Budget | None = None) -> io.BufferedReader:
    """A file's bytes, its compression undone. With a budget, which they spend, a link is not followed."""
    system, inner = _locate(path)
    if budget is not None and not path.startswith(_S3) and not stat.S_ISREG(os.lstat(inner).st_mode):
        raise OSError(f"{path} is a link, or no file")  # checked once before, but it may have been put there since
    raw = system.open_input_stream(inner, compression=_codec(path), buffer_size=_read_ahead(path))
    return io.BufferedReader(raw if budget is None else _Counted(path, raw, budget), 1 << 20)


def open_random(path: str) -> tuple[pyarrow.NativeFile, int]:
    """A file to be read at any place, and how much to read ahead."""
    system, inner = _locate(path)
    return system.open_input_file(inner), _read_ahead(path)


def ending(path: str) -> str:
    """What kind of file it is by its name, without its compression: `.jsonl` for a.JSONL.gz."""
    name = PurePosixPath(path.lower())
    return name.with_suffix("").suffix if _codec(path) else name.suffix


def _read_ahead(path: str) -> int:
    # Of S3, each piece is a request of its own.
    return (8 if path.startswith(_S3) else 1) << 20


def _codec(path: str) -> str | None:
    return _CODECS.get(PurePosixPath(path.lower()).suffix)


def _locate(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if not path.startswith(_S3):
        return pyarrow.fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    inner = path.removeprefix(_S3)
    return _bucket(inner.split("/")[0]), inner


@lru_cache(maxsize=16)
def _bucket(name: str) -> pyarrow.fs.FileSystem:
    # From the bucket alone: a whole address would have to be percent-encoded.
    return pyarrow.fs.FileSystem.from_uri(_S3 + name)[0]


def _find_local(pattern: str) -> Iterator[SourceFile]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):  # a name may well have brackets in it
        paths = [pattern]
    elif "**" in pattern.split("/"):
        # Not glob.glob, which follows links and so runs in circles.
        start = _fixed_part(pattern)
        files = (os.path.join(folder, name) for folder, _, names in os.walk(start or ".") for name in names)
        paths = [file for file in (f if start else f[2:] for f in files) if _matches(file, pattern)]
    else:
        paths = glob.glob(pattern)
    for path in paths:
        if os.path.isfile(path):
            status = os.stat(path)
            yield SourceFile(path, status.st_size, status.st_mtime_ns)


def _find_remote(pattern: str) -> Iterator[SourceFile]:
    path = pattern.removeprefix(_S3)
    system = _bucket(path.split("/")[0])
    if glob.has_magic(path):
        fixed = _fixed_part(path)
        deeper = path.removeprefix(fixed).lstrip("/")
        selector = pyarrow.fs.FileSelector(fixed, allow_not_found=True, recursive="/" in deeper or deeper == "**")
        infos = [i for i in system.get_file_info(selector) if i.path == path or _matches(i.path, path)]
    else:
        infos = [system.get_file_info(path)]
    for info in infos:
        if info.type == pyarrow.fs.FileType.File:
            yield SourceFile(_S3 + info.path, info.size, info.mtime_ns)


def _fixed_part(pattern: str) -> str:
    """The folders before the first one with a wildcard."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")


def _matches(path: str, pattern: str) -> bool:
    return _match_parts(path.split("/"), pattern.split("/"))


def _match_parts(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """As a shell: `*` stays within a folder, `**` goes down any number of them, neither finds hidden names."""
    if not patterns:
        return not parts
    head, rest = patterns[0], patterns[1:]
    visible = bool(parts) and (head.startswith(".") or not parts[0].startswith("."))
    if head == "**":
        return _match_parts(parts, rest or ["*"]) or (visible and _match_parts(parts[1:], patterns))
    return visible and fnmatch.fnmatchcase(parts[0], head) and _match_parts(parts[1:], rest)
