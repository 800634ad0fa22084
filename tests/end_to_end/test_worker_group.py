"""A training over a group of two workers, through Ray Train: the model of one
worker, stopped, resumed, told of a preemption."""

import dataclasses
import json
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import seed_request
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.errors import Stopped
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.in_process import InProcess, LocalControl
from btm_cluster.workers.on_ray.lazily import LazyRayWorkers
from tests.conftest import in_process, run_all
from tests.end_to_end.conftest import BIN, ray_node


@pytest.fixture
def request_for_two(long_fields: dict[str, Any], tmp_path: Path) -> tuple[TrainRequest, Ledger]:
    """The seed of a plan, of a hundred updates, asked of two workers."""
    training = long_fields["training"] | {"updates": 200}
    plan = Plan.model_validate(long_fields | {"store": str(tmp_path / "store"), "training": training})
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
    outcome = run_all(InProcess(copy, LocalControl(lambda _: None, threading.Event())), [alone])[0]
    assert isinstance(outcome, Artifact), outcome
    return copy.open_file(outcome, "model.safetensors")


def train_runs(cluster: dict[str, str]) -> list[str]:
    """The names of Ray Train's runs, as the dashboard knows them."""
    url, header = f"{cluster['DASHBOARD']}/api/train/v2/runs/v1", f"Bearer {cluster['RAY_AUTH_TOKEN']}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": header})) as answer:
        return [run["name"] for run in json.load(answer)["train_runs"]]


class StopAfter:
    """Sets `stop` as soon as a training has made so many updates."""

    def __init__(self, updates: int) -> None:
        self.stop = threading.Event()
        self._updates = updates

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "training" and progress.done >= self._updates:
            self.stop.set()


class PreemptAtFirstUpdate:
    """Announces that a machine will be taken away as soon as a training runs,
    and sets `stop` once that has saved it."""

    def __init__(self, environment: dict[str, str], ledger: Ledger, identity: str) -> None:
        self.stop = threading.Event()
        self.first_update: int | None = None
        self.saved_at: int | None = None
        self._environment, self._ledger, self._identity = environment, ledger, identity
        self._before: int | None = None

    def __call__(self, progress: Progress) -> None:
        if progress.phase != "training":
            return
        update = self._latest()
        if self._before is None:
            self.first_update, self._before = progress.done, update
            self._announce()
        elif update > self._before:
            self.saved_at = update
            self.stop.set()

    def _latest(self) -> int:
        saved = self._ledger.latest_training(self._identity)
        assert saved is not None
        return int(saved.recipe["update"])

    def _announce(self) -> None:
        import ray

        (node,) = [
            n["NodeID"] for n in ray.nodes() if n["Alive"] and "node:__internal_head__" not in n["Resources"]
        ]
        command = [
            str(BIN / "ray"),
            "drain-node",
            f"--node-id={node}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
        ]
        limits = ["--reason-message=spot", "--deadline-remaining-seconds=600"]
        subprocess.run([*command, *limits], env=self._environment, check=True, capture_output=True)


def test_a_group_makes_the_model_of_one_worker(
    cluster: dict[str, str],
    connect: Callable[..., LazyRayWorkers],
    request_for_two: tuple[TrainRequest, Ledger],
    tmp_path: Path,
) -> None:
    request, ledger = request_for_two
    events = RunEvents()
    with connect(ledger, lambda _: None, threading.Event(), events) as workers:
        outcome = run_all(workers, [request])[0]
    assert isinstance(outcome, Artifact), outcome
    (step,) = [one for one in events.timeline().events if one.what == "step"]
    assert (step.cpus, step.role, step.attempt) == (2, "seed", 1)
    assert step.process.startswith("seed-seed-")
    assert outcome.facts["profile"]["workers"] == 2
    assert any(name.startswith(f"seed-seed-{request.ref.identity[:8]}-") for name in train_runs(cluster))
    together = load_file(ledger.open_file(outcome, "model.safetensors"))
    alone = load_file(model_of_one_worker(request, ledger, tmp_path / "alone"))
    for name, tensor in alone.items():
        assert abs(together[name] - tensor).max() < 1e-3, name


def test_a_group_goes_on_from_a_checkpoint_and_saves_for_a_machine_that_will_be_taken_away_and_when_it_is_stopped(
    cluster: dict[str, str],
    connect: Callable[..., LazyRayWorkers],
    request_for_two: tuple[TrainRequest, Ledger],
) -> None:
    request, ledger = request_for_two
    # Too long to end before it is stopped, so that stopping and going on can be told from ending.
    training = request.training.model_copy(update={"updates": 2_000_000})
    # A machine each for the two workers, of which Ray's own notice takes one. Each has a half of the model.
    how = dataclasses.replace(request.how, cpus_per_worker=2, sharding="full")
    endless = dataclasses.replace(request, training=training, last_update=1_000_000, how=how)
    alone = dataclasses.replace(endless, how=dataclasses.replace(request.how, workers=1))
    stopped = StopAfter(updates=300)
    with pytest.raises(Stopped):
        run_all(InProcess(ledger, LocalControl(stopped, stopped.stop)), [alone])
    begun_at = latest_update(ledger, endless)
    preempted = PreemptAtFirstUpdate(cluster, ledger, endless.ref.identity)
    with (
        ray_node(cluster, cpus=2),
        connect(ledger, preempted, preempted.stop) as workers,
        pytest.raises(Stopped),
    ):
        run_all(workers, [endless])
    assert preempted.first_update is not None
    assert preempted.saved_at is not None
    assert 300 <= begun_at < preempted.first_update <= preempted.saved_at < latest_update(ledger, endless)


def latest_update(ledger: Ledger, request: TrainRequest) -> int:
    """The update of the last training checkpoint."""
    saved = ledger.latest_training(request.ref.identity)
    assert saved is not None
    return int(saved.recipe["update"])
