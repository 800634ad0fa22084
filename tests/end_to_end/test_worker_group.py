"""A training over a group of two workers, through Ray Train: the same model as one worker makes, stopped and resumed."""

import dataclasses
import json
import os
import shutil
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from btm_cluster.algorithm import prepare
from btm_cluster.errors import Stopped
from btm_cluster.in_process import InProcess, LocalControl
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.plan import ClusterPlan, Plan
from btm_cluster.recipes import seed_request
from btm_cluster.workers import Progress, TrainRequest
from tests.conftest import in_process


@pytest.fixture
def request_for_two(long_fields: dict[str, Any], tmp_path: Path) -> tuple[TrainRequest, Ledger]:
    """The seed of a plan, asked of two workers."""
    plan = Plan.model_validate(long_fields | {"store": str(tmp_path / "store")})
    driver = in_process(plan)
    request = seed_request(prepare(plan, driver))
    how = dataclasses.replace(request.how, workers=2)
    return dataclasses.replace(request, how=how, checkpoint_seconds=1e9), driver.ledger


def model_of_one_worker(request: TrainRequest, ledger: Ledger, folder: Path) -> Path:
    """The weights that the same request makes in this process, in a copy of the store without them."""
    shutil.copytree(ledger.storage.location, folder)
    shutil.rmtree(folder / "artifacts" / "model")
    alone = dataclasses.replace(request, how=dataclasses.replace(request.how, workers=1))
    copy = Ledger.open(str(folder))
    outcome = InProcess(copy, LocalControl(lambda _: None, threading.Event())).train([alone])[0]
    assert isinstance(outcome, Artifact), outcome
    return copy.open_file(outcome, "model.safetensors")


def train_runs(cluster: dict[str, str]) -> list[str]:
    """The names of Ray Train's runs, as the dashboard knows them."""
    url, header = f"{cluster['DASHBOARD']}/api/train/v2/runs/v1", f"Bearer {cluster['RAY_AUTH_TOKEN']}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": header})) as answer:
        return [run["name"] for run in json.load(answer)["train_runs"]]


class StopAtFirstUpdate:
    """Sets `stop` as soon as a training shows that it runs."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "training":
            self.stop.set()


def test_a_group_makes_the_model_of_one_worker_and_stops_saved_and_goes_on(
    cluster: dict[str, str],
    request_for_two: tuple[TrainRequest, Ledger],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    request, ledger = request_for_two
    from btm_cluster.on_ray.lazily import LazyRayWorkers

    location, settings, address = ledger.storage.location, ClusterPlan(stop_grace_seconds=60), os.environ["RAY_ADDRESS"]
    with LazyRayWorkers(location, lambda _: None, threading.Event(), settings, address, False) as workers:
        outcome = workers.train([request])[0]
    assert isinstance(outcome, Artifact), outcome
    assert outcome.facts["profile"]["workers"] == 2
    assert any(name.startswith(f"seed-seed-{request.ref.identity[:8]}-") for name in train_runs(cluster))
    together = load_file(ledger.open_file(outcome, "model.safetensors"))
    alone = load_file(model_of_one_worker(request, ledger, tmp_path / "alone"))
    for name, tensor in alone.items():
        assert abs(together[name] - tensor).max() < 1e-3, name

    # Too long to end before it is stopped, so that stopping and going on can be told from ending.
    training = request.training.model_copy(update={"updates": 2_000_000})
    endless = dataclasses.replace(request, training=training, last_update=1_000_000)
    reached = [0]
    for _ in range(2):
        watcher = StopAtFirstUpdate()
        with (
            LazyRayWorkers(location, watcher, watcher.stop, settings, address, False) as workers,
            pytest.raises(Stopped),
        ):
            workers.train([endless])
        saved = ledger.latest_training(endless.ref.identity)
        assert saved is not None
        reached.append(saved.recipe["update"])
    assert reached == sorted(set(reached))
