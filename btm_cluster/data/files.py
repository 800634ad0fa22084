"""Files of text, local and in S3, found by path or glob.

Region, endpoint and credentials of S3 come from the standard AWS_* environment variables. Knows nothing of
what is in a file (`streams.py` opens it).
"""

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.fs

from btm_cluster.plan.folder import below, jobs_copy_of

S3 = "s3://"


class SourceFile(NamedTuple):
    """A file of a source, and what tells that it has changed."""

    path: str
    size_bytes: int
    modified_ns: int


def find_files(pattern: str, folder: str = "") -> list[SourceFile]:
    """The files that a path or glob names, each once, by path; empty if there are none.

    A relative pattern begins at `folder`, and so do the paths of what it finds.

    As in a shell: `*` stays within a folder, `**` goes down any number of them, neither finds hidden names.
    Both follow links. Brackets are those of a name where a file or folder has it, else they stand for one of
    several characters.

    Raises:
        OSError, pyarrow.ArrowException: a folder or bucket that cannot be listed.
    """
    find = _find_remote if pattern.startswith(S3) else partial(_find_local, folder=folder)
    found = find(pattern)
    if not found and "[" in pattern:
        found = find(pattern.replace("[", "[[]"))  # such as `notes [v2]*.txt`
    return sorted(found)


def find_below(path: Path, folder: str = "") -> list[SourceFile]:
    """Every file below a local folder, but for hidden ones; a relative path begins at `folder`."""
    return find_files(f"{glob.escape(str(path))}/**", folder)


def opened(file: SourceFile, folder: str) -> str:
    """The path by which a file that was found from `folder` is opened."""
    return file.path if file.path.startswith((S3, "/")) else below(folder, file.path)


def stamp_of_file(file: SourceFile, folder: str) -> list[Any]:
    """A file's path, its size, and its modification time; in a job's copy, where each node has its own, the
    SHA-256 of its bytes instead."""
    path = opened(file, folder)
    if path.startswith(S3) or jobs_copy_of(os.path.abspath(path)) is None or is_lost(path):
        return [readable(file.path), *file[1:]]
    with open(path, "rb") as stream:
        return [readable(file.path), file.size_bytes, hashlib.file_digest(stream, "sha256").hexdigest()]


def is_lost(path: str) -> bool:
    """Whether it is a link to a file or folder that is not there, rather than to itself."""
    try:
        return os.path.islink(path) and not os.path.lexists(os.path.realpath(path))
    except OSError:
        return False


def readable(path: str) -> str:
    """A path as text: of a name that is not UTF-8, the odd bytes as \\xe9, so
    that it can be written anywhere."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


@lru_cache(maxsize=16)
def bucket(name: str) -> pyarrow.fs.FileSystem:
    """The file system that a bucket of S3 is in."""
    # From the bucket alone: a whole address would have to be percent-encoded.
    return pyarrow.fs.FileSystem.from_uri(S3 + name)[0]


class _Child(NamedTuple):
    """An entry of a folder."""

    name: str
    is_folder: bool
    is_link: bool


class _Tree(Protocol):
    """Folders and files, local or as a bucket was listed. Names of folders have no slash at their end."""

    def children(self, folder: str) -> Sequence[_Child]:
        """By name; none, if it is no folder."""

    def has(self, path: str) -> bool:
        """Whether there is a file or folder of this name."""

    def real(self, path: str) -> str:
        """The path without links."""


class _Disk:
    def children(self, folder: str) -> Sequence[_Child]:
        try:
            with os.scandir(folder or ".") as entries:
                return sorted(_Child(entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries)
        except (FileNotFoundError, NotADirectoryError) as exc:
            if os.path.islink(folder):
                raise OSError(f"{readable(folder)} is a link that leads nowhere: mend or remove it") from exc
            return ()

    def has(self, path: str) -> bool:
        return os.path.lexists(path)

    def real(self, path: str) -> str:
        return os.path.realpath(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A link that leads nowhere may lead to a folder whose disk is away, if its name has no ending."""
    return entry.is_dir(follow_symlinks=False) or (
        entry.is_symlink() and (os.path.isdir(entry.path) or (is_lost(entry.path) and "." not in entry.name))
    )


class _Listing:
    """A bucket's keys as a tree."""

    def __init__(self, keys: Mapping[str, object]) -> None:
        self._children: dict[str, set[_Child]] = {}
        for key in keys:
            self._add(key, is_folder=False)

    def _add(self, path: str, is_folder: bool) -> None:
        folder, _, name = path.rpartition("/")
        here = self._children.get(folder)
        if here is None:
            here = self._children[folder] = set()
            if folder:
                self._add(folder, is_folder=True)
        here.add(_Child(name, is_folder, False))

    def children(self, folder: str) -> Sequence[_Child]:
        return sorted(self._children.get(folder, ()))

    def has(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return any(child.name == name for child in self._children.get(folder, ()))

    def real(self, path: str) -> str:
        return path


def _find_local(pattern: str, folder: str) -> list[SourceFile]:
    pattern = os.path.expanduser(pattern)
    is_whole = pattern.startswith("/")
    root, above = ("/", "") if is_whole else (folder, _join(folder, ""))
    real_folder = cache(os.path.realpath)
    found: dict[str, SourceFile] = {}
    paths = dict.fromkeys(_matches(_Disk(), root, [part for part in pattern.split("/") if part]))
    for path in sorted(paths, key=os.path.islink):  # of a file and a link to it, the file
        if os.path.isfile(path) or (glob.has_magic(pattern) and is_lost(path)):
            status = os.stat(path) if os.path.exists(path) else os.lstat(path)
            inside, name = os.path.split(path)
            real = (
                os.path.realpath(path)
                if os.path.islink(path)
                else os.path.join(real_folder(inside or "."), name)
            )
            found.setdefault(real, SourceFile(path.removeprefix(above), status.st_size, status.st_mtime_ns))
    return list(found.values())


def _find_remote(pattern: str) -> list[SourceFile]:
    path = pattern.removeprefix(S3)
    parts = path.split("/")
    system = bucket(parts[0])
    fixed = _fixed_part(system, parts)
    if len(fixed) == len(parts):
        infos = [system.get_file_info(path)]
    else:
        deep = len(parts) - len(fixed) > 1 or parts[-1] == "**"
        selector = pyarrow.fs.FileSelector("/".join(fixed), allow_not_found=True, recursive=deep)
        infos = system.get_file_info(selector)
    files = {
        info.path: SourceFile(S3 + info.path, info.size, info.mtime_ns)
        for info in infos
        if info.type == pyarrow.fs.FileType.File
    }
    return [files[key] for key in dict.fromkeys(_matches(_Listing(files), "", parts)) if key in files]


def _fixed_part(system: pyarrow.fs.FileSystem, parts: Sequence[str]) -> list[str]:
    """The parts of a pattern before the first with a wildcard.

    Brackets are none where there is such a key or folder.
    """
    for i, part in enumerate(parts):
        is_name = not glob.has_magic(part) or (
            _has_only_brackets(part)
            and system.get_file_info("/".join(parts[: i + 1])).type != pyarrow.fs.FileType.NotFound
        )
        if not is_name:
            return list(parts[:i])
    return list(parts)


def _has_only_brackets(part: str) -> bool:
    return "[" in part and "*" not in part and "?" not in part


def _matches(tree: _Tree, folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The paths below a folder that the parts of a pattern match; some of them
    twice, where `**` stands twice."""
    head, rest = parts[0], parts[1:]
    if head == "**":
        for inside in _folders_below(tree, folder):
            yield from _matches(tree, inside, rest or ["*"])
        return
    is_name = not glob.has_magic(head) or (_has_only_brackets(head) and tree.has(_join(folder, head)))
    names = [head] if is_name else [c.name for c in tree.children(folder) if _is_visible_to(head, c.name)]
    for name in names:
        path = _join(folder, name)
        if rest:
            yield from _matches(tree, path, rest)
        else:
            yield path


def _is_visible_to(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))


def _folders_below(tree: _Tree, folder: str) -> Iterator[str]:
    """A folder and all below it that are not hidden, each once by its real path;
    by a link only where no other way leads."""
    seen: set[str] = set()
    plain, linked = [folder], list[str]()
    while plain or linked:
        here = plain.pop() if plain else linked.pop(0)
        real = tree.real(here)
        if real in seen:
            continue
        seen.add(real)
        yield here
        below = [child for child in tree.children(here) if child.is_folder and not child.name.startswith(".")]
        linked += [_join(here, child.name) for child in below if child.is_link]
        plain += [_join(here, child.name) for child in reversed(below) if not child.is_link]


def _join(folder: str, name: str) -> str:
    return f"{folder}{'' if folder in ('', '/') else '/'}{name}"
