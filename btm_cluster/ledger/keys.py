"""The keys of a store: what each folder holds, and which objects below it are none of ours.

A file browser, an editor, a network file system or an S3 console leaves objects of its own in any folder.
Only a key of exactly the right form is taken; what else lies there is told of once, and neither read nor
deleted.
"""

import logging
import re
import threading
from collections.abc import Iterator

from btm_cluster.storage import Entry, Storage

logger = logging.getLogger(__name__)

INBOX, MARKER = "inbox/", "READY"
_HASH = "[0-9a-f]{64}"
_VERSION = "(?:[0-9]{6}|[1-9][0-9]{6,})"
_UPDATE = "(?:[0-9]{9}|[1-9][0-9]{9,})"
# Of an inbox the sender chooses the names: only what hides, folder markers, and what editors leave are none
# of ours.
_IN_INBOX = r"[^./][^/]*/(?!(?:.*/)?(?:\.|#[^/]*#(?:/|$)))(?:.*[^/~])"
_FORMS = {
    "artifacts/": rf"[a-z]+(?:-[a-z]+)*/{_HASH}\.json",
    "baselines/": rf"{_HASH}\.json",
    "blobs/": _HASH,
    "clock/": "[0-9a-f]{32}",
    "expansions/": rf"{_HASH}\.json",
    "forest/": rf"{_VERSION}\.json",
    "held/": rf"{_HASH}-{_VERSION}\.json",
    INBOX: _IN_INBOX,
    "pins/": rf"{_VERSION}\.json",
    "quarantine/": rf"{_HASH}\.json",
    "tombstones/": rf"[a-z]+/{_HASH}\.json",
    "training/": rf"{_HASH}/(?:{_UPDATE}\.json|blobs/{_HASH})",
}
_PATTERNS = {folder: re.compile(form, re.DOTALL) for folder, form in _FORMS.items()}
FOLDERS = tuple(_FORMS)
_SHOWN = 3

_told: set[tuple[str, str]] = set()
_lock = threading.Lock()


def is_ours(key: str) -> bool:
    """Whether a key has the form of those that this package writes, or takes from an inbox."""
    folder, separator, rest = key.partition("/")
    pattern = _PATTERNS.get(folder + separator)
    return pattern is not None and pattern.fullmatch(rest) is not None


def list_ours(storage: Storage, prefix: str) -> list[Entry]:
    """Our objects below a prefix, by key. Others are left alone; a process warns of each once."""
    ours, strays = list[Entry](), list[str]()
    for entry in storage.list(prefix):
        if is_ours(entry.key):
            ours.append(entry)
        else:
            strays.append(entry.key)
    with _lock:
        untold = [key for key in strays if (storage.location, key) not in _told]
        _told.update((storage.location, key) for key in untold)
    if untold:
        shown = ", ".join(map(repr, untold[:_SHOWN])) + (", …" if len(untold) > _SHOWN else "")
        logger.warning(
            "left alone in %s, %d object(s) that are none of the store's: %s", prefix, len(untold), shown
        )
    return ours


def list_strays(storage: Storage) -> Iterator[str]:
    """Keys in the store's folders that are none of ours."""
    for folder in FOLDERS:
        yield from (entry.key for entry in storage.list(folder) if not is_ours(entry.key))
