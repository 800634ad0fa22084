"""Which trainer trains what: one that is there and free before a new one, and none whose training failed."""

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from btm_cluster.ledger import Ref
from btm_cluster.plan import ClusterPlan
from btm_cluster.requests import Resources, ScoreRequest, StepRequest, TrainRequest
from btm_cluster.workers.on_ray import idle, running, trainers
from btm_cluster.workers.on_ray.claims import ClaimedError
from btm_cluster.workers.on_ray.running import Running, would_hold_up_a_training
from btm_cluster.workers.on_ray.supervision import StepState
from btm_cluster.workers.on_ray.trainers import Trainers
from btm_cluster.workers.pending import Pending
from tests.progress_steps import training

ONE_CPU = Resources(1, 0.0, 1, 1, "float32", compile=False)


def expert(label: str, how: Resources = ONE_CPU) -> TrainRequest:
    return replace(training(label), how=how)


class Call:
    """A method of an actor: notes what it is asked for."""

    def __init__(self, asked: list[str]) -> None:
        self.asked = asked
        self.results: list[object] = []

    def remote(self, asked: StepRequest | list[StepRequest], *_: object) -> object:
        self.asked += [one.label for one in (asked if isinstance(asked, list) else [asked])]
        self.results.append(object())
        return self.results[-1]


class Actor:
    """A trainer actor that does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.trained: list[str] = []
        self.scored: list[str] = []
        self.train, self.warm_up = Call(self.trained), Call([])
        self.score = Call(self.scored)

    def __repr__(self) -> str:
        return self.name


class Cluster:
    """Ray as trainers see it: a cluster of so many CPUs, the claims of another driver, and what was killed."""

    def __init__(self, cpus: float = 8.0) -> None:
        self.cpus = self.free = cpus
        self.killed: list[Actor] = []
        self.cancelled: list[object] = []
        self.started: list[Actor] = []
        self.others: set[Ref] = set()
        self.claimed: set[Ref] = set()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": self.free}

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)

    def cancel(self, result: object) -> None:
        self.cancelled.append(result)

    def options(self, name: str, **_: object) -> "Cluster":
        self.started.append(Actor(name.split("-")[1]))
        return self

    def remote(self) -> Actor:
        return self.started[-1]

    def claim(self, model: Ref, name: str) -> None:
        if model in self.others:
            raise ClaimedError(name)
        self.claimed.add(model)

    def give_back(self, model: Ref) -> None:
        self.claimed.discard(model)

    def give_back_all(self, but: Collection[Ref]) -> None:
        self.claimed &= set(but)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    for module in (trainers, running, idle):
        monkeypatch.setattr(module, "ray", cluster)
    monkeypatch.setattr(trainers, "TrainerActor", cluster)
    monkeypatch.setattr(trainers, "Claims", lambda: cluster)
    return cluster


@pytest.fixture
def ours(ray: Cluster) -> Trainers:  # noqa: ARG001
    return Trainers("store", ClusterPlan(), board=None)


def started(ours: Trainers, request: TrainRequest, has_place: bool = True) -> Running:
    """A training under way, whose process is heard of or not."""
    one = ours.start(request)
    running = Running([request], one.result, one.actor, request.how, one.process)
    running.has_place = one.has_place or has_place
    return running


def ended(ours: Trainers, running: Running, well: bool = True, pending: Collection[StepRequest] = ()) -> None:
    """The end of a training: the actor of one that failed was killed."""
    running.may_train_on = well
    if not well:
        running.trainer = None
    assert ours.go_on(running, Pending(list(pending)), []) is None


def started_early(ours: Trainers) -> tuple[Running, TrainRequest, Pending]:
    """A training that ends soon, the next one, `law`, whose process was started early, and what is asked for."""
    seed = expert("seed")
    after = replace(expert("law"), tokenizer=seed.ref)
    first = started(ours, seed)
    first.seconds_left = 1.0
    pending = Pending([seed, after])
    pending.next_batch()
    ours.start_early([after], pending, [first])
    return first, after, pending


def test_a_trainer_trains_the_next_model_that_asks_for_just_its_place(ours: Trainers, ray: Cluster) -> None:
    first = started(ours, expert("law"))
    ended(ours, first)
    larger = started(ours, expert("large", replace(ONE_CPU, cpus_per_worker=2)))
    group = started(ours, expert("group", replace(ONE_CPU, workers=2)))
    second = started(ours, expert("code", replace(ONE_CPU, micro_batch_blocks=8)))
    third = started(ours, expert("games"))
    assert second.trainer is first.trainer
    assert second.process == first.process
    assert second.trainer.trained == ["law", "code"]
    assert {larger.trainer, group.trainer, third.trainer}.isdisjoint({first.trainer})
    assert ray.killed == []


def test_the_actor_of_a_group_is_ended_and_trains_no_model_of_one_worker(
    ours: Trainers, ray: Cluster
) -> None:
    group = started(ours, expert("group", replace(ONE_CPU, workers=2)))
    ended(ours, group)
    assert ray.killed == [group.trainer]
    assert started(ours, expert("law")).trainer is not group.trainer


def test_the_actor_of_a_group_which_holds_nothing_scores_nothing(ours: Trainers, ray: Cluster) -> None:
    how = replace(ONE_CPU, workers=2)
    group = started(ours, expert("group", how))
    model = group.batch[0].ref
    score = ScoreRequest("harbour", "group", model, (Ref("tokens", "1" * 64),), how)
    ended(ours, group, pending=[score])
    assert ray.killed == [group.trainer]


def test_a_group_that_waits_for_two_places_gets_an_idle_trainers(ours: Trainers, ray: Cluster) -> None:
    ray.cpus, ray.free = 2.0, 1.0
    law = started(ours, expert("law"))
    group = started(ours, expert("group", replace(ONE_CPU, workers=2)), has_place=False)
    group.state = StepState.submitted(0.0, is_training=True)
    score = ScoreRequest("harbour", "law", law.batch[0].ref, (Ref("tokens", "1" * 64),), ONE_CPU)
    ended(ours, law)
    ours.end_unneeded(Pending([score]), [group])
    assert ray.killed == [law.trainer]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_trainer_that_failed_or_may_train_no_more_trains_nothing_else(
    ours: Trainers, ray: Cluster, is_lost: bool
) -> None:
    first = started(ours, expert("law"))
    if is_lost:
        ended(ours, first, well=False)
    else:
        first.may_train_on = False  # it was restarted, or has had its place for long
        ours.go_on(first, Pending([]), [])
    second = started(ours, expert("code"))
    assert [actor.name for actor in ray.started] == ["law", "code"]
    assert second.trainer is ray.started[1]


def test_a_free_trainer_takes_the_last_training_that_waits_at_ray_and_none_whose_process_is_there(
    ours: Trainers, ray: Cluster
) -> None:
    law = started(ours, expert("law"))
    heard = started(ours, expert("heard"))
    waiting = [started(ours, expert(label), has_place=False) for label in ("code", "games", "news")]
    large = started(ours, expert("large", replace(ONE_CPU, cpus_per_worker=2)), has_place=False)
    elsewhere = Running([expert("another driver's")], object())
    running: dict[Any, Running] = {one.result: one for one in (heard, *waiting, large, elsewhere)}
    ended(ours, law)
    ours.take_over(running)
    assert law.trainer.trained == ["law", "news"]
    assert ray.killed == [ray.started[4]], "the actor that waited for a place"
    news = waiting[-1]
    assert (news.trainer, news.process, news.has_place) == (law.trainer, law.process, True)
    assert set(running) == {one.result for one in (heard, *waiting, large, elsewhere)}
    assert running[news.result] is news
    ours.take_over(running)
    assert len(ray.killed) == 1, "there is no other trainer"


def test_a_model_is_claimed_from_its_start_to_its_end_whoever_trains_it(ours: Trainers, ray: Cluster) -> None:
    law, code, games = expert("law"), expert("code"), expert("games")
    ray.others.add(games.ref)
    first = started(ours, law)
    assert ray.claimed == {law.ref}
    ended(ours, first)
    assert ray.claimed == set()
    second = started(ours, code)
    assert second.trainer is first.trainer
    assert ray.claimed == {code.ref}
    ended(ours, second)
    with pytest.raises(ClaimedError, match="games"):
        ours.start(games)
    ended(ours, started(ours, law), well=False)
    assert ray.claimed == set()


def test_a_free_trainer_comes_before_a_process_that_was_started_early_and_has_no_place_yet(
    ours: Trainers, ray: Cluster
) -> None:
    seed, placed, unplaced = expert("seed"), expert("placed"), expert("unplaced")
    made = [replace(one, tokenizer=seed.ref) for one in (placed, unplaced)]
    first = started(ours, seed)
    first.seconds_left = 1.0
    pending = Pending(made)
    pending_seed = Pending([seed, *made])
    assert pending_seed.next_batch() == [seed]
    ours.start_early(made, pending_seed, [first])
    early = ray.started[1:]
    assert [actor.name for actor in early] == ["placed", "unplaced"]
    assert ray.claimed == {seed.ref, *(one.ref for one in made)}
    ours.heard("placed")
    first.may_train_on = True
    assert ours.go_on(first, pending, []) is None
    assert ours.start(made[0]).actor is early[0]
    second = ours.start(made[1])
    assert (second.actor, second.has_place) == (first.trainer, True)
    assert ray.killed == [early[1]]
    assert ray.cancelled == early[1].warm_up.results, "else Ray prints that it tries again"


def test_a_training_that_is_started_early_again_is_not_taken_for_placed_before_it_is_heard(
    ours: Trainers, ray: Cluster
) -> None:
    first, after, pending = started_early(ours)
    ours.heard("law")
    ours.start_early([], pending, [first])
    ours.start_early([after], pending, [first])
    assert [actor.name for actor in ray.started] == ["seed", "law", "law"]
    assert ours.start(after).has_place is False


def test_a_trainer_is_ended_where_a_training_waits_that_needs_another_place(
    ours: Trainers, ray: Cluster
) -> None:
    ray.free = 0.0
    law = started(ours, expert("law"))
    large = started(ours, expert("large", replace(ONE_CPU, cpus_per_worker=2)), has_place=False)
    large.state = StepState.submitted(0.0, is_training=True)
    running: dict[Any, Running] = {large.result: large}
    ended(ours, law)
    ours.take_over(running)
    ours.end_unneeded(Pending([]), running.values())
    assert ray.killed == [law.trainer]


@pytest.mark.parametrize("lacks", ["", "4 GPUs"])
def test_a_score_takes_no_gpu_while_a_group_waits_for_several_that_the_cluster_has(
    ours: Trainers, ray: Cluster, lacks: str
) -> None:
    gpu = replace(ONE_CPU, gpus_per_worker=1.0)
    law = started(ours, expert("law", gpu))
    group = started(ours, expert("group", replace(gpu, workers=4)), has_place=False)
    group.state = StepState.submitted(0.0, is_training=True, waits_for=lacks)
    score = ScoreRequest("harbour", "seed", Ref("model", "2" * 64), (Ref("tokens", "1" * 64),), gpu)
    on_cpu = replace(score, how=ONE_CPU)
    ended(ours, law)
    assert would_hold_up_a_training(score, [group]) is (not lacks)
    assert would_hold_up_a_training(on_cpu, [group]) is False
    scoring = list(ours.score_ready(Pending([score]), [group]))
    assert [one.trainer for one in scoring] == ([law.trainer] if lacks else [])
    group.state = replace(group.state, phase="preparing")
    assert would_hold_up_a_training(score, [group]) is False
    assert ray.killed == []


def test_at_its_end_a_driver_keeps_what_it_started_early_for_the_next_call(
    ours: Trainers, ray: Cluster
) -> None:
    first, after, _ = started_early(ours)
    ended(ours, first)
    ours.end_call([after], keeps_idle=False)
    assert ray.killed == [first.trainer]
    assert ray.claimed == {after.ref}
    ours.end_all()
    assert [one.name for one in ray.killed] == ["seed", "law"]
    assert ray.claimed == set()


def test_between_two_calls_a_trainer_is_kept_which_trains_in_the_next(ours: Trainers, ray: Cluster) -> None:
    first = started(ours, expert("law"))
    ended(ours, first)
    ours.end_call([], keeps_idle=True)
    assert ray.claimed == set()
    ours.begin_call()
    assert started(ours, expert("code")).trainer is first.trainer
    assert ray.killed == []


def test_between_two_calls_a_trainer_is_kept_for_a_while_only_and_not_longer_than_its_driver(
    ours: Trainers, ray: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(ours, expert("law"))
    ended(ours, first)
    ours.end_call([], keeps_idle=True)
    ours.end_all()
    assert ray.killed == [first.trainer]
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.01)
    second = started(ours, expert("code"))
    ended(ours, second)
    ours.end_call([], keeps_idle=True)
    deadline = time.monotonic() + 30
    while len(ray.killed) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ray.killed[1] is second.trainer
    ours.begin_call()
    assert started(ours, expert("games")).trainer not in ray.killed


def test_a_trainer_with_a_gpu_is_kept_without_a_score_to_come_unless_its_place_is_wanted(
    ours: Trainers, ray: Cluster
) -> None:
    gpu = replace(ONE_CPU, gpus_per_worker=0.5)
    law, code = (started(ours, expert(label, how)) for label, how in (("law", gpu), ("code", ONE_CPU)))
    ended(ours, law)
    ended(ours, code)
    ours.end_unneeded(Pending([]), [])
    assert ray.killed == [code.trainer]
    waiting = Pending([expert("large", replace(gpu, gpus_per_worker=1.0))])
    ours.end_unneeded(waiting, [])
    assert ray.killed == [code.trainer, law.trainer]


def test_idle_trainers_with_gpus_hold_at_most_half_of_the_cpus(ours: Trainers, ray: Cluster) -> None:
    gpu = replace(ONE_CPU, gpus_per_worker=0.1, cpus_per_worker=2)
    running = [started(ours, expert(label, gpu)) for label in ("law", "code", "games")]
    for one in running:
        ended(ours, one)
    ours.end_unneeded(Pending([]), [])
    assert ray.killed == [running[2].trainer], "of eight CPUs"
