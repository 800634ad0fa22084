"""How far a run is and how long it still takes, as it is counted and estimated."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest

from btm_cluster.driver.outlook import Outlook
from btm_cluster.driver.port import Failure
from btm_cluster.driver.steady_estimate import SteadyEstimate
from btm_cluster.driver.step_kinds import OTHERS, kind_of
from btm_cluster.requests import FindOverlap, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.steps.registry import STEPS
from tests.progress_steps import Clock, at_update, made, reading, scoring, tokenising, training

SEED = training("seed", "seed", 0, 300)
EXPERTS = [training(name, "expert", 300, 600) for name in ("kitchen", "harbour", "orchard")]


def counts(outlook: Outlook) -> dict[str, tuple[int, int, int]]:
    return {one.kind.done: (one.done, one.failed, one.total) for one in outlook.counts()}


@dataclass(frozen=True)
class Going:
    """How a run goes, whose updates take a second each."""

    jitter: float = 0.0
    """By how much of itself an update may be faster or slower."""
    start_seconds: float = 0.0
    """In which nothing is at work, before each training."""
    stall_every: int = 10**9
    stall_seconds: float = 0.0
    """A checkpoint after so many updates, and how long it takes."""
    load_seconds: float = 0.0
    """Of a training, before its first update."""
    load: float = 0.0
    """The spread of the logarithm of the pace, by other work that comes and goes within a minute or so."""


@dataclass(frozen=True)
class Shown:
    """An estimate beside what turned out to be true, in seconds."""

    now: float
    left: float | None
    truth: float


def play(trainings: Sequence[TrainRequest], going: Going) -> list[Shown]:
    """The estimates that are shown once a second of a run, one training after the other."""
    clock, estimate = Clock(), SteadyEstimate()
    outlook = Outlook(clock=clock)
    outlook.ask(trainings)
    told: list[tuple[float, float | None]] = []

    def wait(seconds: float) -> None:
        end = clock.now + seconds
        while clock.now < end:
            clock.now = min(end, clock.now + 1.0)
            told.append((clock.now, estimate.update(clock.now, outlook.seconds_left())))

    draw, pace = random.Random(1), 0.0
    for request in trainings:
        wait(going.start_seconds)
        outlook.hear(Progress(request.label, "loading"))
        wait(going.load_seconds)
        for update in range(request.first_update + 1, request.last_update + 1):
            wait(math.exp(pace) + going.jitter * draw.uniform(-1, 1))
            pace += going.load * math.sqrt(2 / 60) * draw.gauss(0, 1) - pace / 60
            outlook.hear(at_update(request, update))
            if update % going.stall_every == 0:
                wait(going.stall_seconds)
        outlook.end(request, made(request.ref))
    return [Shown(now, left, clock.now - now) for now, left in told]


GOINGS = {
    "steady": Going(),
    "jittery": Going(jitter=0.5),
    "with checkpoints": Going(stall_every=60, stall_seconds=5.0),
    "slow to load": Going(load_seconds=20.0),
    "slow to start": Going(start_seconds=30.0),
    "all of it": Going(0.5, 10.0, 60, 5.0, 10.0),
}


@pytest.mark.parametrize("name", GOINGS)
def test_an_estimate_is_near_the_truth_and_rises_little(name: str) -> None:
    """What it rises by, in all, has a cause: what checkpoints and starts took, and some jitter."""
    shown = [one for one in play([SEED, *EXPERTS], GOINGS[name]) if one.left is not None]
    assert len(shown) > 1100
    for one in shown[30:]:
        assert one.left is not None
        assert abs(one.left - one.truth) <= 0.25 * one.truth + 15, one
    rises = [after.left - before.left for before, after in pairwise(shown)]  # type: ignore[operator]
    going = GOINGS[name]
    lost = 4 * (going.start_seconds + going.load_seconds) + 1200 // going.stall_every * going.stall_seconds
    assert sum(rise for rise in rises if rise > 0) <= 1.5 * lost + 120 * going.jitter
    falls = [-change for change in rises if change < -5]
    assert len(falls) <= 12  # else it counts down by the clock


def test_on_a_machine_with_other_work_an_estimate_does_not_go_up_and_down() -> None:
    """The pace of each minute is up to four times that of another; set right at once, it rose by two thirds of the
    run in all."""
    shown = [one.left for one in play([SEED, *EXPERTS], Going(load=0.6)) if one.left is not None]
    assert sum(max(0.0, after - before) for before, after in pairwise(shown)) < 0.25 * len(shown)


def test_never_is_next_to_nothing_shown_with_minutes_to_go() -> None:
    for going in GOINGS.values():
        for one in play([SEED, *EXPERTS], going):
            assert one.left is None or one.left >= 60 or one.truth < 120, one


def test_nothing_is_estimated_before_a_models_pace_is_known() -> None:
    clock = Clock()
    outlook = Outlook(clock=clock)
    outlook.ask([reading("kitchen")])
    outlook.hear(Progress("kitchen", "reading", 500, 1000, "bytes"))
    clock.now = 10.0
    assert outlook.seconds_left() is None  # the rest of the run is not known
    outlook.end(reading("kitchen"), made(reading("kitchen").ref))
    outlook.ask([SEED, *EXPERTS])
    assert outlook.seconds_left() is None
    outlook.hear(at_update(SEED, 1))
    clock.now = 20.0
    assert outlook.seconds_left() is None  # a single report has no pace
    outlook.hear(at_update(SEED, 11))
    assert outlook.seconds_left() == pytest.approx(289 + 3 * 300, rel=0.01)


def test_experts_that_run_side_by_side_take_the_time_of_one() -> None:
    def left(at_once: int) -> float | None:
        clock = Clock()
        outlook = Outlook(lambda _: at_once, clock)
        outlook.ask([SEED, *EXPERTS])
        outlook.hear(at_update(SEED, 0))
        clock.now = 100.0
        outlook.hear(at_update(SEED, 100))
        return outlook.seconds_left()

    assert left(1) == pytest.approx(200 + 900)
    assert left(2) == pytest.approx(200 + 450)
    assert left(8) == pytest.approx(200 + 300)


@pytest.mark.parametrize("together", [True, False])
def test_scores_are_paced_whether_a_batch_ends_at_once_or_one_by_one(together: bool) -> None:
    clock, texts = Clock(), [f"text-{i}" for i in range(4)]
    outlook = Outlook(clock=clock)
    for text in texts:
        outlook.found(tokenising(text), made(tokenising(text).ref, tokens=3000))
    outlook.found(EXPERTS[0], made(EXPERTS[0].ref))
    scores = [scoring(text, EXPERTS[0]) for text in texts]
    others = [scoring(text, EXPERTS[1]) for text in texts]
    outlook.ask([*scores, *others])
    outlook.hear(Progress("with kitchen", "scoring", 0, 120, "blocks"))
    for number, score in enumerate(scores, 1):
        clock.now += 0.0 if together and number < len(scores) else 40.0 if together else 10.0
        if not together:
            outlook.end(score, made(score.ref))
    for score in scores if together else ():
        outlook.end(score, made(score.ref))
    assert outlook.seconds_left() == pytest.approx(40.0)


def test_a_score_is_taken_for_a_third_of_a_training_until_one_has_ended() -> None:
    clock, score = Clock(), scoring("market", SEED)
    outlook = Outlook(clock=clock)
    outlook.found(tokenising("market"), made(tokenising("market").ref, tokens=3000))
    outlook.ask([SEED, score])
    outlook.hear(at_update(SEED, 0))
    clock.now = 300.0
    outlook.end(SEED, made(SEED.ref))  # 30,000 tokens in 300 s
    assert outlook.seconds_left() == pytest.approx(10.0)


def test_steps_are_counted_with_what_was_there_what_is_expected_and_what_has_failed() -> None:
    outlook = Outlook(clock=Clock())
    outlook.expect([reading("kitchen"), SEED, *EXPERTS])
    assert counts(outlook) == {
        "texts read": (0, 0, 1),
        "seed trained": (0, 0, 1),
        "experts trained": (0, 0, 3),
    }
    assert not any(one.is_asked for one in outlook.counts())
    outlook.found(reading("kitchen"), made(reading("kitchen").ref))
    renamed = [training(name, "expert", 300, 500) for name in ("kitchen", "harbour")]
    outlook.ask([SEED, *renamed])  # their texts were read, and their identities are others
    outlook.end(SEED, made(SEED.ref))
    outlook.end(renamed[0], Failure("kitchen", 3, "somewhere", "it diverged"))
    assert counts(outlook) == {
        "texts read": (1, 0, 1),
        "seed trained": (1, 0, 1),
        "experts trained": (0, 1, 2),
    }


def test_a_report_that_comes_after_the_end_of_its_step_is_passed_over() -> None:
    outlook = Outlook(clock=Clock())
    outlook.ask([SEED])
    outlook.hear(at_update(SEED, 300))
    assert [one.done for one in outlook.running()] == [300]
    outlook.end(SEED, made(SEED.ref))
    outlook.hear(Progress("seed", "storing"))
    assert outlook.running() == []


def test_the_wait_for_a_place_is_no_part_of_a_trainings_pace() -> None:
    clock = Clock()
    outlook = Outlook(clock=clock)
    outlook.ask([SEED, EXPERTS[0]])
    outlook.hear(Progress("seed", "waiting", note="for a free GPU"))
    clock.now = 5000.0
    outlook.hear(Progress("seed", "loading"))
    clock.now = 5300.0
    outlook.end(SEED, made(SEED.ref))
    left = outlook.seconds_left()
    assert left is not None
    assert 300 <= left <= 300 + 5000  # and the wait itself may come again


def sequence(*seconds_left: float | None) -> Iterator[float | None]:
    estimate = SteadyEstimate()
    for now, left in enumerate(seconds_left):
        yield estimate.update(float(now), left)


@pytest.mark.parametrize(
    ("estimated", "shown"),
    [
        ([None, None], [None, None]),
        ([100, 99, 98], [100, 99, 98]),
        ([100, 95, 105, 92, 101], [100, 99, 98, 97, 96]),
        ([100, 150, 149, 148], [100, 101, 102, 103]),  # as a load that may be over soon
        ([1000, 400], [1000, 400]),  # half of it
        ([100, None, 300], [100, None, 300]),
        ([2, 2, 2, 2, 80], [2, 1, 0, 0, 80]),
    ],
)
def test_what_is_shown_drifts_to_what_is_estimated_and_leaps_where_that_is_far_off(
    estimated: list[float | None], shown: list[float | None]
) -> None:
    assert list(sequence(*estimated)) == pytest.approx(shown, abs=1.0)


def test_every_step_of_the_registry_has_a_count_and_a_new_one_is_counted_among_others() -> None:
    for request_type in STEPS:
        requested = SEED if request_type is TrainRequest else object.__new__(request_type)
        assert kind_of(requested) != OTHERS

    class NewStep(FindOverlap):
        """As whoever adds a step writes it."""

    assert kind_of(object.__new__(NewStep)) == OTHERS
