"""Sixteen new domains into a forest of sixty-four: how often the store is asked.

The workers are fakes that commit at once.
"""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btm_cluster.algorithm import grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.operations.expand import expand
from btm_cluster.plan import Plan
from btm_cluster.requests import (
    AverageRequest,
    FitText,
    ReadText,
    ScoreRequest,
    StepRequest,
    Tokenize,
    TrainRequest,
)
from btm_cluster.steps.average import weights_of
from btm_cluster.steps.fit import fit_text
from btm_cluster.storage import Entry
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.workers.in_process import LocalControl
from tests.living import put
from tests.made import text

BLOCKS, TOKENS = 4, 8


class Counting(LocalFolder):
    """A folder that counts what is asked of it, and does not wait for the disk."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.asked = Counter[str]()

    def create(self, key: str, data: bytes) -> bool:
        self.asked["create"] += 1
        path = Path(self.location, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return not path.exists() and bool(path.write_bytes(data) + 1)

    def upload(self, key: str, path: Path, keep: bool = True) -> None:  # noqa: ARG002 - it is copied
        self.asked["upload"] += 1
        Path(self.location, key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, Path(self.location, key))

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        self.asked["read"] += 1
        return super().read(key, start, size)

    def download(self, key: str, anew: bool = False) -> Path:
        self.asked["download"] += 1
        return super().download(key, anew)

    def list(self, prefix: str) -> Iterator[Entry]:
        self.asked["list"] += 1
        return super().list(prefix)


class AtOnce:
    """Workers that commit something of the right form, by a ledger that nobody counts."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger, self._folder = ledger, folder

    def get_ready(self, trainings: Sequence[StepRequest]) -> None:
        """Nothing."""

    def run(self, requests: Sequence[StepRequest]) -> Iterator[tuple[StepRequest, Outcome]]:
        yield from ((request, self._make(request)) for request in requests)

    def _make(self, request: StepRequest) -> Artifact:
        if isinstance(request, FitText):
            return fit_text(request, self._ledger, LocalControl(lambda _: None, threading.Event()))
        if isinstance(request, ScoreRequest):
            nothing = -np.ones((BLOCKS, TOKENS), np.float32)
            return self._commit(request, {"logp.npy": nothing, "entropy.npy": nothing})
        if isinstance(request, TrainRequest):
            return self._model(request, {"role": request.role})
        if isinstance(request, AverageRequest):
            return self._model(request, {"weights": weights_of(request, self._ledger)})
        if isinstance(request, ReadText):
            splits = {
                split: {"documents": 4, "characters": 9, "words": 9, "shards": [f"{split}-00000.jsonl.zst"]}
                for split in ("train", "development", "test")
            }
            documents = text(request.label.ljust(64, "0"))
            self._ledger.commit(documents, {}, {"duplicates": 0, "splits": splits})
            return self._ledger.commit(request, {}, {"skipped": {}}, parts=[documents.ref])
        if isinstance(request, Tokenize):
            owners = np.tile(np.arange(BLOCKS)[:, None], TOKENS)
            return self._commit(request, {"tokens.npy": owners, "documents.npy": owners}, {"blocks": BLOCKS})
        return self._commit(request, {})

    def _model(self, request: StepRequest, facts: dict[str, Any]) -> Artifact:
        own = np.frombuffer(bytes.fromhex(request.ref.identity), np.uint8)
        shared = {name: np.zeros(1) for name in ("config.json", "tokenizer.json")}
        return self._commit(request, {"model.safetensors": own, **shared}, facts)

    def _commit(self, request: Any, arrays: dict[str, Any], facts: dict[str, Any] | None = None) -> Artifact:
        files = {}
        for name, array in arrays.items():
            files[name] = self._folder / name
            with files[name].open("wb") as file:
                np.save(file, array)
        return self._ledger.commit(request, files, facts or {})


def plan_of(fields: dict[str, Any], folder: Path, names: Iterator[str]) -> Plan:
    domains = []
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
        domains.append({"name": name, "text": str(folder / f"{name}.jsonl")})
    return Plan.model_validate(fields | {"domains": domains, "targets": []})


def test_sixteen_into_sixty_four_asks_the_store_a_few_times_for_each_new_score_and_not_more(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    plan = plan_of(fields, tmp_path, (f"domain-{number:02d}" for number in range(64)))
    ledger = Ledger(Counting(plan.store))  # the workers', which nobody counts
    forest = grow(plan, Driver(ledger, AtOnce(ledger, tmp_path))).forest
    assert len(forest.experts) == 64
    for number in range(16):
        put(ledger, tmp_path, f"new-{number:02d}/a.jsonl", b'{"text": "new"}\n')
        put(ledger, tmp_path, f"new-{number:02d}/READY", b"")
    storage = Counting(plan.store)
    found = expand(plan, Driver(Ledger(storage), AtOnce(ledger, tmp_path)))
    assert len(found.forest.experts) == 80
    assert found.made == {"source": 16, "tokens": 48, "fit": 16, "model": 32, "scores": 1280}
    # A fit and an average for each new domain. The scores of 80 experts on 16 texts are looked up once, and
    # those of the 64 once more beside the new ones; they are opened for the averages, and for the gains
    # without and with the new experts.
    assert storage.asked["read"] < 2 * 1280 + 300
    assert storage.asked["download"] < 3 * 1280
    assert storage.asked["list"] < 150
    assert storage.asked["create"] == 17
    storage.asked.clear()
    assert expand(plan, Driver(Ledger(storage), AtOnce(ledger, tmp_path))).made == {}
    assert storage.asked.total() < 30
