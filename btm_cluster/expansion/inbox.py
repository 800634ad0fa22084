"""The inbox of a store: domains that have arrived, `inbox/<name>/` with text files
and a marker READY, written last.

Whoever can write there is not trusted: names, sizes, kinds and links are checked here, before a byte is read;
lines, documents and what files decompress to are bounded while they are read. Knows nothing of tokens or
models.
"""

import glob
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_cluster.identity import identity_of
from btm_cluster.ledger import Ledger, is_ours, list_ours
from btm_cluster.ledger.keys import INBOX, MARKER
from btm_cluster.ledger.records import find_refusals, quarantine
from btm_cluster.plan import DomainPlan, Plan
from btm_cluster.plan.expansion import InboxPlan
from btm_cluster.plan.kinds import ROWS, UNREAD, ending, kind_of
from btm_cluster.plan.text_rules import DEFAULT_FIELD
from btm_cluster.plan.values import NAME_PATTERN
from btm_cluster.storage import Entry, Storage
from btm_cluster.storage.local_folder import walk

# What a Parquet file becomes in memory is bounded by nothing: its sizes are what it says of itself.
REFUSED_KINDS = {*UNREAD, ".parquet"}
_FILE_NAME = re.compile(r"\w[\w .,+=@-]{0,199}")
_DEEPEST_FOLDERS = 8


@dataclass(frozen=True)
class Arrival:
    """A domain whose files are complete, as they lie in the inbox."""

    domain: DomainPlan
    identity: str
    """Identity of the files with their times, the marker's too: it changes with whatever
    is written there, and so ends a quarantine."""
    contents: str
    """Identity of their names and sizes alone: it stays when a store is moved."""
    fingerprint: Mapping[str, Any]
    """As of any source, but from the listing, so that thousands of files are not asked for one by one."""


@dataclass(frozen=True)
class Inbox:
    """The contents of an inbox."""

    arrivals: tuple[Arrival, ...]
    waiting: Mapping[str, str]
    """Folders that are left alone for now, and why."""
    quarantined: Mapping[str, str]
    """Folders that were refused, now or before, and why."""
    known: Mapping[str, str]
    """Names and sizes, as a hash, of the files of domains that were not looked at."""


@dataclass(frozen=True)
class _Folder:
    """A folder of the inbox: its files, and what is no plain file, by paths below the folder."""

    name: str
    files: Mapping[str, Entry]
    odd: Mapping[str, str]
    """Why each is odd."""

    @property
    def identity(self) -> str:
        stamps = [[path, entry.size_bytes, entry.modified] for path, entry in sorted(self.files.items())]
        return identity_of({"folder": self.name, "files": stamps, "odd": sorted(self.odd)})

    @property
    def texts(self) -> dict[str, Entry]:
        """The files that are text: all but the marker."""
        return {path: entry for path, entry in sorted(self.files.items()) if path != MARKER}


def look(ledger: Ledger, plan: Plan, known: Collection[str]) -> Inbox:
    """Arrivals in the inbox, but for the domains in `known`.

    Those that are refused are quarantined, and not looked at again.
    """
    folders, bounds = list(_folders(ledger.storage)), plan.expansion.inbox
    earlier = find_refusals(ledger, [folder.identity for folder in folders if folder.name not in known])
    arrivals: list[Arrival] = []
    waiting, refused, old = dict[str, str](), dict[str, str](), dict[str, str]()
    for folder in folders:
        if folder.name in known:
            old[folder.name] = _contents(folder)
        elif folder.identity in earlier:
            refused[folder.name] = earlier[folder.identity].reason
        elif not_yet := _unfinished(folder):
            waiting[folder.name] = not_yet
        elif reason := _refusal(folder, plan):
            quarantine(ledger, folder.name, folder.identity, reason)
            refused[folder.name] = reason
        elif len(arrivals) == bounds.most_domains:
            waiting[folder.name] = f"the plan takes {bounds.most_domains} at once"
        else:
            arrivals.append(_arrival(folder, ledger.storage, bounds))
    return Inbox(tuple(arrivals), waiting, refused, old)


def refuse(ledger: Ledger, arrival: Arrival, reason: str) -> None:
    """Quarantines what turned out to be unusable once it was read."""
    quarantine(ledger, arrival.domain.name, arrival.identity, reason)


def still_lies_there(ledger: Ledger, arrival: Arrival) -> bool:
    """Whether the files are those that were found: nobody replaced or took them meanwhile."""
    name = arrival.domain.name
    return any(f.name == name and f.identity == arrival.identity for f in _folders(ledger.storage, name))


def _folders(storage: Storage, name: str = "") -> Iterator[_Folder]:
    found: dict[str, dict[str, Entry]] = {}
    below = f"{INBOX}{name}/" if name else INBOX
    for entry in list_ours(storage, below):
        folder, _, path = _readable(entry.key.removeprefix(INBOX)).partition("/")
        found.setdefault(folder, {})[path] = entry
    odd: dict[str, dict[str, str]] = {}
    for key, why in _odd_files(storage.address(below.rstrip("/"))):
        folder, _, path = _readable(f"{below.removeprefix(INBOX)}{key}").partition("/")
        if is_ours(f"{INBOX}{folder}/{path or MARKER}"):  # an editor's lock is a link, too
            odd.setdefault(folder, {})[path] = why
    for folder in sorted(found.keys() | odd.keys()):
        yield _Folder(folder, found.get(folder, {}), odd.get(folder, {}))


def _readable(name: str) -> str:
    """A local name that is not UTF-8 gets question marks, with which it is refused,
    instead of failing wherever it is written."""
    return name.encode(errors="replace").decode()


def _odd_files(address: str) -> Iterator[tuple[str, str]]:
    """Paths below a local folder that are no files of their own, and why: links, pipes, devices.

    Object storage has none.
    """
    if "://" in address:
        return
    for folder, folders, files in walk(address):
        for path in (Path(folder, name) for name in (*folders, *files)):
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue  # taken away while we looked
            key = path.relative_to(address).as_posix()
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                yield key, "is a hard link, so it may be somebody else's file: deliver a copy"
            elif not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                yield key, "is a link, or no file"


def _unfinished(folder: _Folder) -> str:
    """Why a folder is left alone for now; nothing, if it is complete."""
    marker = folder.files.get(MARKER)
    if marker is None:
        return "" if folder.odd and not folder.files else f"no {MARKER} yet"
    later = [path for path, entry in folder.texts.items() if entry.modified > marker.modified]
    return f"{later[0]} is newer than {MARKER}, which is written last" if later and not folder.odd else ""


def _refusal(folder: _Folder, plan: Plan) -> str:
    """Why a complete folder is refused before a byte of it is read; nothing, if it is not."""
    bounds, texts = plan.expansion.inbox, folder.texts
    size = sum(entry.size_bytes for entry in texts.values())
    if not re.fullmatch(NAME_PATTERN, folder.name):
        return "a name that no domain can have: lower-case letters, digits, - and _, the first a letter or digit, 64 at most"
    if folder.name in {text.name for text in plan.texts}:
        return "the plan has a text of this name"
    if folder.odd:
        path, why = min(folder.odd.items())
        return f"{path or 'the folder'} {why}"
    if not texts:
        return "no text files"
    if len(texts) > bounds.most_files:
        return f"{len(texts)} files; the plan takes {bounds.most_files} (expansion.inbox.most_files)"
    if size > 1e9 * bounds.most_gigabytes:
        return f"{size:,} bytes; the plan takes {bounds.most_gigabytes:g} GB (expansion.inbox.most_gigabytes)"
    return next((reason for path in texts if (reason := _file_refusal(path))), "")


def _file_refusal(path: str) -> str:
    parts: Sequence[str] = path.split("/")
    if len(parts) > _DEEPEST_FOLDERS or not all(_FILE_NAME.fullmatch(part) for part in parts):
        return f"{path[:100]!r} is no name for a file here: letters, digits, space and .,+=@_-"
    if ending(path) in REFUSED_KINDS:
        return f"{path} is a {ending(path)} file; text, tables and JSON lines are taken, plain, .gz, .zst or .bz2"
    return ""


def _arrival(folder: _Folder, storage: Storage, settings: InboxPlan) -> Arrival:
    addresses = {storage.address(entry.key): entry for entry in folder.texts.values()}
    # A setting is for all deliveries, of which some have no use for it.
    kinds = {kind_of(path) for path in folder.texts}
    domain = DomainPlan(
        name=folder.name,
        text=tuple(map(glob.escape, addresses)),
        field=settings.field if kinds & ROWS else DEFAULT_FIELD,
        messages=settings.messages if kinds <= ROWS else None,
        delimiter=settings.delimiter if "plain text" in kinds else None,
    )
    stamps = [[address, entry.size_bytes, entry.modified] for address, entry in addresses.items()]
    ready = folder.files[MARKER].modified
    return Arrival(domain, folder.identity, _contents(folder), {"inbox": stamps, "ready": ready})


def _contents(folder: _Folder) -> str:
    return identity_of({"files": [[path, entry.size_bytes] for path, entry in folder.texts.items()]})
