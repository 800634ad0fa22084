"""Supervision of a step on the cluster: every transition of its phases, and
when it is called hanging or waiting."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from btm_cluster.requests.progress import Progress
from btm_cluster.workers.on_ray.supervision import Action, Kill, Limits, Phase, Say, StepState, supervise

LIMITS = Limits(hang_seconds=120, start_seconds=600, waiting_seconds=60)
STARTING, LOADING, STORING = (Progress("seed", phase) for phase in ("starting", "loading", "storing"))
IMPORTING = Progress("seed", "importing")
UPDATING = Progress("seed", "training", done=3, loss=4.2)


def training(phase: Phase, heard_at: float = 0.0, waits_for: str = "") -> StepState:
    return StepState(heard_at, 0.0, phase, is_training=True, waits_for=waits_for)


@pytest.mark.parametrize(
    ("before", "news", "after"),
    [
        ("queued", STARTING, "queued"),
        ("queued", LOADING, "preparing"),
        ("queued", IMPORTING, "preparing"),
        ("queued", UPDATING, "updating"),
        ("queued", STORING, "preparing"),
        ("preparing", STARTING, "queued"),
        ("preparing", LOADING, "preparing"),
        ("preparing", IMPORTING, "preparing"),
        ("preparing", UPDATING, "updating"),
        ("preparing", STORING, "preparing"),  # resumed at its last update: only storing is left
        ("updating", STARTING, "queued"),
        ("updating", LOADING, "preparing"),
        ("updating", IMPORTING, "updating"),
        ("updating", UPDATING, "updating"),
        ("updating", STORING, "updating"),  # a milestone
    ],
    ids=lambda value: value.phase if isinstance(value, Progress) else value,
)
def test_a_report_moves_a_training_to_its_next_phase_and_is_a_sign_that_it_does_not_hang(
    before: Phase, news: Progress, after: Phase
) -> None:
    state = training(before, heard_at=1.0)
    assert supervise(state, news, 9_999.0, LIMITS) == (replace(state, phase=after, heard_at=9_999.0), None)


HANGS_UPDATING = Kill("without an update for 2 min, killed")
HANGS_PREPARING = Kill("without an update for 12 min, killed")


@pytest.mark.parametrize(
    ("phase", "silent_seconds", "action"),
    [
        ("queued", 1e9, None),  # it waits for its turn, however long
        ("preparing", 120.0, None),
        ("preparing", 719.9, None),
        ("preparing", 720.0, HANGS_PREPARING),
        ("updating", 119.9, None),
        ("updating", 120.0, HANGS_UPDATING),
    ],
)
def test_silence_is_a_hang_after_a_time_that_is_longer_before_the_first_update(
    phase: Phase, silent_seconds: float, action: Action
) -> None:
    state, now = training(phase, heard_at=50.0), 50.0 + silent_seconds
    expected = state if action is None else replace(state, heard_at=now)
    assert supervise(state, None, now, LIMITS) == (expected, action)


@pytest.mark.parametrize("phase", ["queued", "preparing", "updating"])
def test_a_step_that_reports_nothing_regularly_is_never_called_hanging(phase: Phase) -> None:
    state = replace(training(phase), is_training=False)
    assert supervise(state, None, 1e9, LIMITS) == (state, None)


@pytest.mark.parametrize(
    ("waits_for", "seconds", "action"),
    [
        ("", 1e9, None),
        ("2 GPUs", 59.9, None),
        ("2 GPUs", 60.0, Say("for the cluster to grow to 2 GPUs")),
    ],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_a_step_without_room_says_so_every_minute(
    waits_for: str, seconds: float, action: Action, is_training: bool
) -> None:
    state = StepState.submitted(0.0, is_training, waits_for)
    expected = state if action is None else replace(state, said_at=seconds)
    assert supervise(state, None, seconds, LIMITS) == (expected, action)


@pytest.mark.parametrize(("news", "waits_for"), [(STARTING, "2 GPUs"), (LOADING, ""), (UPDATING, "")])
def test_a_step_waits_for_room_until_it_is_heard_at_work(news: Progress, waits_for: str) -> None:
    state, _ = supervise(training("queued", waits_for="2 GPUs"), news, 1.0, LIMITS)
    assert state.waits_for == waits_for


def actions(reports: Sequence[tuple[float, Progress | None]]) -> list[tuple[float, Action]]:
    """Actions on reports at their times, from submission at 0."""
    state, taken = StepState.submitted(0.0, is_training=True, waits_for="1 GPU"), []
    for now, news in reports:
        state, action = supervise(state, news, now, LIMITS)
        if action is not None:
            taken.append((now, action))
    return taken


def test_a_training_that_waits_starts_hangs_and_is_restarted() -> None:
    waits = Say("for the cluster to grow to 1 GPU")
    assert actions(
        [
            (59.0, None), (60.0, None), (119.0, None), (121.0, None),
            (1000.0, STARTING), (1000.2, LOADING), (1700.0, None),
            (1710.0, UPDATING), (1820.0, UPDATING), (1939.0, None), (1940.0, None),  # silent since 1820
            (2059.0, None), (2060.0, None),  # it did not die: killed again
            (2061.0, STARTING), (9000.0, None),  # restarted, and its group waits for its nodes
            (9001.0, LOADING), (9720.0, None), (9721.0, None),
        ]
    ) == [
        (60.0, waits), (121.0, waits),
        (1940.0, HANGS_UPDATING), (2060.0, HANGS_UPDATING), (9721.0, HANGS_PREPARING),
    ]  # fmt: skip


def test_a_restarted_training_may_load_as_long_as_the_first_time_though_its_start_was_not_heard() -> None:
    """Only the newest report since the last look is known: "starting" was overtaken by
    "loading", and the short limit held."""
    assert actions([(1.0, LOADING), (10.0, UPDATING), (20.0, LOADING), (700.0, None)]) == []
