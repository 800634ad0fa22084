"""How a call of the workers on Ray ends: who is asked to save before it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from btm_cluster.plan import ClusterPlan
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.on_ray import workers
from btm_cluster.workers.on_ray.running import Running
from btm_cluster.workers.on_ray.workers import RayWorkers
from tests.progress_steps import training


class Trainer:
    """An actor that notes whether it was asked to stop."""

    def __init__(self) -> None:
        self.is_asked = False
        self.stop = self

    def remote(self) -> None:
        self.is_asked = True


def making_updates(label: str, trainer: Trainer | None) -> Running:
    running = Running([training(label)], object(), trainer)
    running.state = replace(running.state, phase="updating")
    return running


def test_a_training_that_a_mistake_has_ended_is_not_asked_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[Any] = []
    monkeypatch.setattr(workers, "ray", SimpleNamespace(wait=lambda results, **_: waited_for.extend(results)))
    said: list[Progress] = []
    call = RayWorkers.__new__(RayWorkers)
    call._watcher, call._cluster = said.append, ClusterPlan()
    trainer = Trainer()
    ended, under_way = making_updates("purged", None), making_updates("kitchen", trainer)
    call._stop_all([ended, under_way])
    assert [(one.label, one.phase) for one in said] == [("kitchen", "saving")]
    assert trainer.is_asked
    assert waited_for == [under_way.result]
