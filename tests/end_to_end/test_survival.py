"""Processes, machines and drivers that die or hang while a forest grows: it
ends as if nothing had happened."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.timelines import list_runs, read_timeline
from tests.end_to_end.conftest import (
    GROW,
    SESSION,
    Btm,
    experts_in,
    only_trainer,
    plain,
    ray_head,
    ray_node,
    trainers,
    write_prepared,
)


def wait_until_an_expert_trains(run: Btm) -> None:
    run.wait_until_said(r"(kitchen|harbour): training update [1-9]")


def test_of_two_trainers_one_hangs_and_one_is_killed_and_both_go_on_from_their_checkpoints(
    cluster: dict[str, str],
    grow_only: Callable[[Path], Btm],
    long_fields: dict[str, Any],
    undisturbed: Forest,
    tmp_path: Path,
) -> None:
    run = grow_only(
        write_prepared(long_fields, undisturbed, tmp_path, hang_minutes=0.3, concurrent_experts=1)
    )
    wait_until_an_expert_trains(run)
    first, second = ("kitchen", "harbour") if "kitchen: training" in run.said else ("harbour", "kitchen")
    os.kill(only_trainer(cluster[SESSION]), signal.SIGSTOP)
    run.wait_until_said(f"{first}: hanging without an update for 0.3 min, killed")
    run.wait_until_said(f"{second}: training update [1-9]")
    os.kill(only_trainer(cluster[SESSION]), signal.SIGKILL)
    assert run.exit_code() == 0, run.said
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    ledger = Ledger.open(str(tmp_path / "store"))
    happened = [
        (one.what, one.label, one.attempt)
        for one in read_timeline(ledger, list_runs(ledger)[0]).events
        if one.kind == "train" and one.what in ("step", "failure")
    ]
    for name in (first, second):
        assert [(what, attempt) for what, label, attempt in happened if label == name] == [
            ("failure", 1),
            ("step", 2),
        ]


def test_a_trainer_that_is_killed_at_its_second_expert_goes_on_from_the_checkpoint_of_that_one(
    cluster: dict[str, str],
    grow_only: Callable[[Path], Btm],
    long_fields: dict[str, Any],
    undisturbed: Forest,
    tmp_path: Path,
) -> None:
    run = grow_only(write_prepared(long_fields, undisturbed, tmp_path, concurrent_experts=1))
    wait_until_an_expert_trains(run)
    first, second = ("kitchen", "harbour") if "kitchen: training" in run.said else ("harbour", "kitchen")
    trainer = only_trainer(cluster[SESSION])
    run.wait_until_said(f"{second}: training update [1-9]")
    assert trainers(cluster[SESSION]) == [trainer]
    os.kill(trainer, signal.SIGKILL)
    assert run.exit_code() == 0, run.said
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    ledger = Ledger.open(str(tmp_path / "store"))
    events = [one for one in read_timeline(ledger, list_runs(ledger)[0]).events if one.kind == "train"]
    happened = [(one.what, one.label, one.attempt) for one in events if one.what in ("step", "failure")]
    assert happened == [("step", first, 1), ("failure", second, 1), ("step", second, 2)]
    assert len({one.process for one in events}) == 1


def test_a_trainer_whose_process_always_dies_is_reported_with_attempts_host_and_siblings_stay(
    cluster: dict[str, str],
    grow_only: Callable[[Path], Btm],
    long_fields: dict[str, Any],
    undisturbed: Forest,
    tmp_path: Path,
) -> None:
    session = cluster[SESSION]
    run = grow_only(write_prepared(long_fields, undisturbed, tmp_path, retries=1, concurrent_experts=1))
    wait_until_an_expert_trains(run)
    first = "harbour" if "harbour: training" in run.said else "kitchen"
    for _ in range(2):
        pid = only_trainer(session)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while pid in trainers(session) or (
            not trainers(session) and run.process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.1)
    assert run.exit_code() == 1, run.said
    report = re.search(rf"- {first}: (\d) attempt\(s\), on \S+, its process or node died: .*", run.said)
    assert report, run.said
    assert report.group(1) in "12"
    assert set(experts_in(tmp_path / "store")) == {"harbour", "kitchen"} - {first}
    again = grow_only(tmp_path / "plan.yaml")
    assert again.exit_code() == 0, again.said
    assert experts_in(tmp_path / "store") == plain(undisturbed)


def start_two(grow_only: Callable[[Path], Btm], plan: Path) -> tuple[Btm, Btm]:
    """Two drivers of one plan: the one that trains the seed, and the one that waits for it."""
    both = [grow_only(plan), grow_only(plan)]
    waiting = "seed: waiting for another driver, which trains it"
    deadline = time.monotonic() + 240
    while not any(waiting in run.said for run in both):
        assert time.monotonic() < deadline, [run.said for run in both]
        time.sleep(0.1)
    first, second = sorted(both, key=lambda run: waiting in run.said)
    return first, second


def test_of_two_drivers_of_one_plan_one_waits_for_what_the_other_trains_and_follows_it_where_it_vanishes(
    grow_only: Callable[[Path], Btm], long_fields: dict[str, Any], undisturbed: Forest, tmp_path: Path
) -> None:
    path = write_prepared(long_fields, undisturbed, tmp_path, has_seed=False)
    first, second = start_two(grow_only, path)
    first.process.kill()
    assert first.exit_code() == -signal.SIGKILL
    second.wait_until_said("seed: (starting|loading|training)")
    runs = second, grow_only(path)
    for run in runs:
        assert run.exit_code() == 0, run.said
    trained = [set(re.findall(r"INFO (\w+): training update", run.said)) for run in runs]
    assert not trained[0] & trained[1]
    assert trained[0] | trained[1] == {"seed", "kitchen", "harbour"}
    assert "seed" in trained[0]
    assert "waiting for another driver, which trains it" in runs[1].said
    assert experts_in(tmp_path / "store") == plain(undisturbed)
    assert not list((tmp_path / "store/training").rglob("*.json"))


def test_when_a_machine_is_lost_its_experts_go_on_at_another(
    long_fields: dict[str, Any], undisturbed: Forest, tmp_path: Path
) -> None:
    (tmp_path / "head").mkdir()
    with (
        ray_head(
            tmp_path / "head", "--port=0", "--include-dashboard=false", "--no-monitor", cpus=1
        ) as environment,
        ray_node(environment, cpus=2) as lost,
        ray_node(environment, cpus=2),
    ):
        run = Btm(
            [str(write_prepared(long_fields, undisturbed, tmp_path))], environment, tmp_path / "said", GROW
        )
        wait_until_an_expert_trains(run)
        os.killpg(lost.pid, signal.SIGKILL)
        assert run.exit_code() == 0, run.said
    assert experts_in(tmp_path / "store") == plain(undisturbed)


@pytest.fixture(autouse=True)
def _no_trainer_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No orphan holds what others wait for."""
    yield
    if "cluster" in request.fixturenames:
        session = request.getfixturevalue("cluster")[SESSION]
        deadline = time.monotonic() + 30
        while trainers(session) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert trainers(session) == []
