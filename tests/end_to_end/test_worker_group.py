"""A training over a group of two workers, through Ray Train: the same model as one worker makes, stopped and resumed."""

import dataclasses
import os
import shutil
import threading
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


def test_a_group_stops_saved_at_one_update_goes_on_and_makes_the_model_that_one_worker_makes(
    cluster: dict[str, str],
    request_for_two: tuple[TrainRequest, Ledger],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    request, ledger = request_for_two
    from btm_cluster.on_ray.lazily import LazyRayWorkers

    stop = threading.Event()
    stopped: list[Progress] = []

    def stop_once(progress: Progress) -> None:
        if progress.phase == "training" and not stopped:
            stopped.append(progress)
            stop.set()

    location, settings = ledger.storage.location, ClusterPlan(stop_grace_seconds=60)
    with LazyRayWorkers(location, stop_once, stop, settings, os.environ["RAY_ADDRESS"], False) as workers:
        with pytest.raises(Stopped):
            workers.train([request])
        saved = ledger.latest_training(request.ref.identity)
        assert saved is not None
        assert 0 < saved.recipe["update"] < request.last_update
        stop.clear()
        outcome = workers.train([request])[0]
    assert isinstance(outcome, Artifact), outcome
    assert outcome.facts["profile"]["workers"] == 2
    together = load_file(ledger.open_file(outcome, "model.safetensors"))
    alone = load_file(model_of_one_worker(request, ledger, tmp_path / "alone"))
    for name, tensor in alone.items():
        assert abs(together[name] - tensor).max() < 1e-3, name
