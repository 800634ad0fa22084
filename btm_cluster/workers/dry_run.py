"""The workers of a dry run: nothing is made, and every step that a run would take is noted.

The driver walks as in a real run, over the store as it stands. What a step would commit is a placeholder,
kept in memory, so that whatever follows it can be named. A text that is not read yet hides its identity, and
with it all that depends on it.
"""

import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from btm_cluster.driver.port import Outcome
from btm_cluster.errors import MissingError, StoreError
from btm_cluster.identity import identity_of
from btm_cluster.ledger import Artifact, Ledger, Origin, Ref
from btm_cluster.requests import MergeRequest, ReadText, ShuffleTexts, StepRequest, Tokenize, TrainRequest
from btm_cluster.storage import Entry, Storage
from btm_cluster.storage.scratch import scratch_folder
from btm_cluster.workers.pending import Pending

_HELD_OUT = ("development", "test")


class Overlay:
    """A store as it stands, under objects that are kept in memory: nothing is written to it."""

    def __init__(self, below: Storage) -> None:
        self.location, self._below = below.location, below
        self._objects: dict[str, bytes] = {}
        self._keys: defaultdict[str, dict[str, None]] = defaultdict(dict)
        """Those of the objects, by folder: each commit lists tombstones, and there may be many placeholders."""

    @property
    def copies_bytes(self) -> int:
        return self._below.copies_bytes

    def check(self) -> None:
        self._below.check()

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._below.size(key)
        except MissingError:
            if key in self._objects:
                return False
            self._put(key, data)
            return True
        return False

    def upload(self, key: str, path: Path, keep: bool = True) -> None:  # noqa: ARG002 - it is read
        self._put(key, path.read_bytes())

    def _put(self, key: str, data: bytes) -> None:
        self._objects[key] = data
        self._keys[key.partition("/")[0]][key] = None

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        if key not in self._objects:
            return self._below.read(key, start, size)
        return self._objects[key][start : None if size is None else start + size]

    def download(self, key: str, anew: bool = False) -> Path:
        if key in self._objects:
            raise StoreError(f"{key} is a placeholder of a dry run, which nothing reads")
        return self._below.download(key, anew)

    def size(self, key: str) -> int:
        return len(self._objects[key]) if key in self._objects else self._below.size(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = {entry.key: entry for entry in self._below.list(prefix)}
        for key in self._placeholders(prefix):
            entries[key] = Entry(key, len(self._objects[key]), time.time())
        yield from (entries[key] for key in sorted(entries))

    def _placeholders(self, prefix: str) -> Sequence[str]:
        folder, slash, _ = prefix.partition("/")
        keys = self._keys[folder] if slash else self._objects
        return [key for key in keys if key.startswith(prefix)]

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        return self._below.unfinished(prefix)

    def discard(self, key: str) -> None:
        raise StoreError(f"a dry run discards nothing: {key}")

    def delete(self, key: str) -> None:
        self._objects.pop(key, None)
        self._keys[key.partition("/")[0]].pop(key, None)

    def erase_object(self, key: str) -> None:
        self.delete(key)

    def erase(self, prefix: str) -> None:
        for key in self._placeholders(prefix):
            self.delete(key)

    def address(self, key: str) -> str:
        return self._below.address(key)


class DryRun:
    """The port, making nothing. `ledger` is over an Overlay."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        forest = ledger.log.newest()
        known = (
            {}
            if forest is None
            else dict(forest.foundation.domains) | {e.domain: e.text for e in forest.experts}
        )
        self._texts_of_forest = known
        self.asked: dict[Ref, StepRequest] = {}
        """Every step that would be made."""
        self.hidden: set[Ref] = set()
        """Artifacts whose identity hangs on a text that is not read yet."""

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        """Nothing: there is no other process."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        pending = Pending(requests)
        while batch := pending.next_batch():
            for request in batch:
                self.asked[request.ref] = request
                made = self._placeholder(request)
                if self.hides(request):
                    self.hidden.update(request.makes)
                yield request, made
                yield from pending.finish(request, made)

    def hides(self, request: StepRequest) -> bool:
        """Whether a request's artifact hangs on a text that is not read yet."""
        return any(ref in self.hidden for refs in request.inputs.values() for ref in refs)

    def _placeholder(self, request: StepRequest) -> Artifact:
        if isinstance(request, ReadText | ShuffleTexts):
            return self._unread(request)
        if isinstance(request, Tokenize):
            return self._ledger.commit(request, {}, {"blocks": 1, "tokens": 1})
        if isinstance(request, TrainRequest | MergeRequest):
            weights = {model.identity: 1.0 for model in request.inputs.get("models", ())}
            facts = {"role": "average", "weights": weights} if weights else {"role": "placeholder"}
            with scratch_folder() as scratch:
                (scratch / "weights").touch()
                return self._ledger.commit(request, {"model.safetensors": scratch / "weights"}, facts)
        return self._ledger.commit(request, {}, {})

    def _unread(self, request: ReadText | ShuffleTexts) -> Artifact:
        """A text that is to be read.

        Its identity is known where it was read before and lost; else it is hidden.

        The text of a domain of the forest is then taken to be the forest's, since another one is refused.
        """
        read = self._ledger.find(request.ref)
        if read is not None:
            text = read.parts[0]
        else:
            text = Ref(
                "text", self._texts_of_forest.get(request.label) or identity_of({"unread": request.label})
            )
            self.hidden |= {text, request.ref}
        if self._ledger.find(text) is None:
            is_target = isinstance(request, ReadText) and request.is_target
            splits = {
                split: {"documents": 1, "words": 1, "shards": [f"{split}-00000"]} for split in _HELD_OUT
            }
            splits["train"] = {"documents": 1, "words": 1, "shards": [] if is_target else ["train-00000"]}
            placeholder = Origin(text, {"documents": text.identity}, {})
            self._ledger.commit(placeholder, {}, {"splits": splits, "duplicates": 0})
        return read or self._ledger.commit(request, {}, {"skipped": {}}, parts=[text])
