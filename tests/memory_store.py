"""A store in memory, with trouble at the operation that a test names: for tests
that end a process at every one in turn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from btm_cluster.errors import MissingError
from btm_cluster.ledger import documents, records
from btm_cluster.operations import verify
from btm_cluster.storage import Entry

Result = TypeVar("Result")


class Crash(BaseException):
    """The process is gone; nothing of ours catches this."""


class InMemory:
    """A store in a dictionary, with a clock that a test sets, and trouble at
    the operation that a test names."""

    location = "memory"
    copies_bytes = 0

    def __init__(self, folder: Path) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.now = 1_000_000.0
        self.folder = folder
        self.dead = False
        self.operations = 0
        self.trouble_at = 0
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.repeats = False
        """The operation in trouble is done twice, as by an adapter that did not hear the first answer."""

    def crash(self) -> None:
        self.dead = True  # what cleans up in a process that is gone does nothing more either
        raise Crash

    def arm(self, operation: int, **trouble: Any) -> None:
        """Trouble at the n-th operation from now; none with 0."""
        self.dead, self.operations, self.trouble_at = False, 0, operation
        self.before = trouble.get("before", lambda: None)
        self.after = trouble.get("after", lambda: None)
        self.repeats = trouble.get("repeats", False)

    def check(self) -> None:
        pass

    def create(self, key: str, data: bytes) -> bool:
        def act() -> bool:
            taken = key in self.objects
            if not taken:
                self.objects[key] = (data, self.now)
            return not taken

        return self._do(act)

    def upload(self, key: str, path: Path, keep: bool = True) -> None:  # noqa: ARG002 - it is read
        self._do(lambda: self.objects.update({key: (path.read_bytes(), self.now)}))

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        return self._do(lambda: self._bytes(key)[start : None if size is None else start + size])

    def download(self, key: str, anew: bool = False) -> Path:  # noqa: ARG002 - nothing is cached
        path = self.folder / key.replace("/", "-")
        self._do(lambda: path.write_bytes(self._bytes(key)))
        return path

    def size(self, key: str) -> int:
        return self._do(lambda: len(self._bytes(key)))

    def unfinished(self, _prefix: str) -> Iterator[Entry]:
        return iter(())

    def discard(self, key: str) -> None:
        self.delete(key)

    def erase_object(self, key: str) -> None:
        self.delete(key)

    def erase(self, prefix: str) -> None:
        for entry in self.list(prefix):
            self.delete(entry.key)

    def address(self, key: str) -> str:
        return f"memory://{key}"

    def list(self, prefix: str) -> Iterator[Entry]:
        here = self._do(
            lambda: [(key, *self.objects[key]) for key in sorted(self.objects) if key.startswith(prefix)]
        )
        return iter([Entry(key, len(data), modified) for key, data, modified in here])

    def delete(self, key: str) -> None:
        self._do(lambda: self.objects.pop(key, None))

    def _bytes(self, key: str) -> bytes:
        if key not in self.objects:
            raise MissingError(f"cannot read {key}")
        return self.objects[key][0]

    def _do(self, act: Callable[[], Result]) -> Result:
        if self.dead:
            raise Crash
        self.operations += 1
        troubled = self.operations == self.trouble_at
        if troubled:
            self.before()
            if self.repeats:
                act()
        try:
            return act()
        finally:
            if troubled:
                self.after()


class OneAfterAnother:
    """A pool of no threads, so that the n-th operation is the same one each time."""

    def __init__(self, _threads: int) -> None:
        self.map = map

    def __enter__(self) -> "OneAfterAnother":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def without_threads(patch: pytest.MonkeyPatch) -> None:
    """Has store calls made one after the other."""
    for module in (documents, verify, records):
        patch.setattr(module, "ThreadPoolExecutor", OneAfterAnother)
