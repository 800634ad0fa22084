"""Which requests of a call may start, in which order, and what fails with
an input: on records of no meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.ledger import Inputs, Ref
from btm_cluster.requests import AverageRequest, StepRequest
from btm_cluster.workers.pending import Pending


@dataclass(frozen=True)
class Made(StepRequest):
    """A request by name, that needs what others make."""

    kind: ClassVar[str] = "thing"
    label: str
    of: tuple["Made", ...] = ()
    passes: tuple["Made", ...] = ()
    turn: int | None = None
    together: str | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"name": self.label}

    @property
    def inputs(self) -> Inputs:
        return {"of": tuple(one.ref for one in self.of)}

    @property
    def priority(self) -> int | None:
        return self.turn

    @property
    def batch(self) -> object:
        return self.together

    @property
    def makes(self) -> tuple[Ref, ...]:
        return (self.ref, *(one.ref for one in self.passes))


DONE: Outcome = object()  # type: ignore[assignment]
FAILED = Failure("seed", 3, "on a host", "died")


def names(batch: list[StepRequest]) -> list[str]:
    return [request.label for request in batch]


def all_ready(pending: Pending) -> list[list[str]]:
    return [names(batch) for batch in iter(pending.next_batch, [])]


def test_a_request_starts_once_all_that_it_needs_is_made_in_the_order_in_which_they_were_asked_for() -> None:
    seed, other = Made("seed"), Made("other")
    late, both = Made("late", (seed,)), Made("both", (seed, other))
    pending = Pending([both, late, seed, other])
    assert all_ready(pending) == [["seed"], ["other"]]
    assert pending.finish(seed, DONE) == []
    assert all_ready(pending) == [["late"]]
    pending.finish(other, DONE)
    assert all_ready(pending) == [["both"]]
    assert len(pending) == 0


def test_an_input_that_nobody_of_the_call_makes_is_not_waited_for() -> None:
    assert all_ready(Pending([Made("late", (Made("elsewhere"),))])) == [["late"]]


def test_whatever_hangs_on_a_failure_fails_once_and_names_the_nearest_input() -> None:
    seed = Made("seed")
    expert, other = Made("expert", (seed,)), Made("other", (seed,))
    score = Made("score", (expert, other))
    pending = Pending([seed, expert, other, score, Made("alone")])
    assert all_ready(pending) == [["seed"], ["alone"]]
    failed = pending.finish(seed, FAILED)
    assert [request.label for request, _ in failed] == ["expert", "score", "other"]
    assert failed[0][1].cause == "its input failed: seed"
    assert failed[1][1].cause == "its input failed: expert"
    assert len(pending) == 0


def test_a_model_that_is_asked_for_by_name_is_waited_for_there_and_not_where_it_is_passed() -> None:
    seed = Made("seed")
    whole = Made("whole", passes=(seed,))
    expert = Made("expert", (seed,))
    pending = Pending([whole, seed, expert])
    assert all_ready(pending) == [["whole"], ["seed"]]
    pending.finish(whole, DONE)
    assert all_ready(pending) == []
    pending.finish(seed, DONE)
    assert all_ready(pending) == [["expert"]]
    pending = Pending([whole, expert])
    assert all_ready(pending) == [["whole"]], "else it is waited for where it is passed"


@pytest.mark.parametrize("waiting", [True, False])
def test_a_training_of_a_higher_number_starts_once_none_of_a_lower_one_waits(waiting: bool) -> None:
    seed, rival = Made("seed", turn=0), Made("rival", turn=1)
    expert = Made("expert", (seed,), turn=0)
    pending = Pending([rival, seed, expert, Made("score")])
    assert all_ready(pending) == [["seed"], ["score"]]
    pending.finish(seed, DONE)
    limit = (lambda request: request.label != "expert") if waiting else (lambda _: True)
    assert names(pending.next_batch(limit)) == ([] if waiting else ["expert"])
    assert all_ready(pending) == ([["expert"], ["rival"]] if waiting else [["rival"]])


def test_a_training_that_one_of_a_lower_number_waits_for_need_not_wait_for_it() -> None:
    whole = Made("whole", turn=1)
    expert = Made("expert", (whole,), turn=0)
    assert all_ready(Pending([expert, whole])) == [["whole"]]


def test_requests_of_one_batch_start_together_as_far_as_they_are_ready() -> None:
    seed = Made("seed")
    scores = [Made("a", together="model"), Made("b", (seed,), together="model"), Made("c", together="model")]
    pending = Pending([*scores, Made("d", together="another"), seed])
    assert all_ready(pending) == [["a", "c"], ["d"], ["seed"]]
    pending.finish(seed, DONE)
    assert all_ready(pending) == [["b"]]


def test_what_came_to_nothing_is_taken_again_in_its_place() -> None:
    first, second = Made("first"), Made("second")
    pending = Pending([first, second])
    assert names(pending.next_batch()) == ["first"]
    pending.put_back(first)
    assert all_ready(pending) == [["first"], ["second"]]


def test_what_a_request_awaits_is_unfinished_and_named_by_who_makes_it() -> None:
    text, seed = Made("text"), Made("seed")
    average = Made("average", (seed,))
    expert, later = Made("expert", (average, text)), Made("later", (seed,))
    pending = Pending([text, seed, average, expert])
    assert pending.awaited(expert) == {average.ref, text.ref}
    assert pending.awaited_in_turn(expert) == {average.ref, text.ref, seed.ref}
    assert pending.awaited(later) == {seed.ref}, "of another call, which needs what this one makes"
    for request in iter(pending.next_batch, []):
        pending.finish(request[0], DONE)
        if request[0] is seed:
            break
    assert pending.awaited_in_turn(expert) == {average.ref}
    assert pending.awaited(later) == set()


def test_averages_that_failed_together_are_tried_alone() -> None:
    """One may fail of a damaged model that has no weight in the others."""
    models = tuple(Made(f"model {number}").ref for number in range(2))
    averages = [AverageRequest(f"average {share}", models, (share, 1 - share)) for share in (0.2, 0.3, 0.4)]
    pending = Pending(averages)
    batch = pending.next_batch()
    assert batch == averages
    assert pending.take_apart(batch)
    assert all_ready(pending) == [["average 0.2"], ["average 0.3"], ["average 0.4"]]
    assert not pending.take_apart(averages[:1]), "it fails of its own"
    assert not pending.take_apart([Made("a", together="model"), Made("b", together="model")])
