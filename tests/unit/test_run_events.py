"""The events that a run gathers: what is over, what is under way, what is left out, and what was held."""

from typing import Any

import pytest

from btm_cluster.driver import run_events
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.ledger.timelines import Event, Node
from btm_cluster.requests.progress import Progress


class Clock:
    """Shows what it is set to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def event(began: float, ended: float, **fields: Any) -> Event:
    known = {"what": "step", "kind": "train", "label": "seed", "gpus": 2.0, "cpus": 4.0}
    return Event.model_validate(known | fields | {"began": began, "ended": ended})


@pytest.fixture
def clock() -> Clock:
    return Clock(100.0)


@pytest.fixture
def events(clock: Clock) -> RunEvents:
    return RunEvents("run", clock)


def test_what_is_under_way_is_told_until_now_and_counted_with_what_is_over(
    events: RunEvents, clock: Clock
) -> None:
    assert not events.are_any
    events.add_node("n", Node(name="host", gpus=8, cpus=64))
    events.begin("seed", event(105, 105))
    events.add(event(101, 103, label="kitchen"))
    events.add(event(101, 104, what="wait", label="harbour"))
    clock.now = 110.0
    seen = events.timeline()
    assert [(one.label, one.began, one.ended) for one in seen.events] == [
        ("kitchen", 101, 103), ("harbour", 101, 104), ("seed", 105, 110),
    ]  # fmt: skip
    assert (seen.command, seen.began, seen.ended, seen.outcome) == ("run", 100, 110, "running")
    assert (seen.gpu_seconds, seen.cpu_seconds) == ((2 + 5) * 2, (2 + 5) * 4), "waiting costs nothing"
    assert events.end("seed") == event(105, 110)
    assert [one.label for one in events.timeline("done").events] == ["kitchen", "harbour"]


def test_of_very_many_events_the_short_ones_are_left_out_and_still_counted(
    events: RunEvents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_events, "MOST_EVENTS", 3)
    events.add(event(100, 100, what="failure", label="failed"))
    for i in range(10):
        events.add(event(101 + i, 101 + i + (10 if i in (2, 7) else 1), label=str(i)))
    seen = events.timeline()
    assert [one.label for one in seen.events] == ["failed", "2", "7"]
    assert seen.left_out == 8
    assert seen.gpu_seconds == 2 * (8 + 2 * 10)


def test_each_checkpoint_of_a_training_under_way_is_told_once(events: RunEvents, clock: Clock) -> None:
    events.begin("seed", event(101, 101, node="n", process="seed-actor"))
    clock.now = 120.0
    for update, stalled, stored in ((1, None, None), (2, 0.5, None), (3, 0.5, 4.0), (4, 0.5, 4.0)):
        events.watch(
            Progress("seed", "training", update, 0, 9, 3.0, stall_seconds=stalled, upload_seconds=stored)
        )
    events.watch(Progress("kitchen", "training", 1, 0, 9, 3.0, stall_seconds=1.0, upload_seconds=1.0))
    (checkpoint,) = [one for one in events.timeline().events if one.what == "checkpoint"]
    assert (checkpoint.began, checkpoint.ended, checkpoint.node) == (115.5, 120.0, "n")
    assert checkpoint.cause == "training stalled for 0.5 s"


def test_a_stop_is_told_from_when_it_was_asked_for(events: RunEvents, clock: Clock) -> None:
    clock.now = 130.0
    events.add_stop(125.0)
    (stop,) = events.timeline("stopped").events
    assert (stop.what, stop.label, stop.began, stop.ended) == ("stop", "run", 125, 130)
