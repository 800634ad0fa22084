"""The trainer actors of one driver: started before their turn where there is
room, and kept while they can train or score.

To start a process, import, open a GPU and compile takes longer than many a training. So a training's actor
starts while the last of what it waits for is made, where nobody holds the place; and one that has trained
trains the next model that would have to wait for just its place, or scores, if need be, other models too.
"""

import math
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from btm_cluster.driver.capacity import bundle
from btm_cluster.ledger import Ref
from btm_cluster.plan import ClusterPlan
from btm_cluster.requests import Resources, ScoreRequest, StepRequest, TrainRequest
from btm_cluster.workers.on_ray.claims import ClaimedError, Claims
from btm_cluster.workers.on_ray.idle import Idle, IdleTrainers
from btm_cluster.workers.on_ray.running import Running, end_trainer, would_hold_up_a_training
from btm_cluster.workers.on_ray.training import TrainerActor, trainer_name, trainer_options
from btm_cluster.workers.pending import Pending

START_SECONDS = 8.0
"""About how long a process takes to start, import and open a GPU."""

SHORT_STEPS_PER_CPU = 4
"""So many steps other than trainings, on each CPU, take about as long as a
training's process takes to start."""


@dataclass(frozen=True)
class Started:
    """A training that was asked of a trainer: its result to come, the actor and that one's name."""

    result: Any
    actor: Any
    process: str
    has_place: bool
    """Whether the actor is known to have its place on the cluster."""


class Trainers:
    """Starts trainers, early or when asked for, has them go on, and ends those that nobody needs."""

    def __init__(self, store: str, cluster: ClusterPlan, board: Any) -> None:
        self._store, self._retries, self._board = store, cluster.retries, board
        self._at_once = cluster.concurrent_experts or sys.maxsize
        self._cpus = ray.cluster_resources().get("CPU", 1.0)
        self._claims = Claims()
        self._early: dict[Ref, tuple[TrainRequest, Any, Any]] = {}
        """Trainings to come, with their actor and its warm-up's result."""
        self._placed: set[str] = set()
        """Labels of trainings whose actor, started early, has its place on the cluster."""
        self._idle = IdleTrainers(self._cpus)
        self._score_seconds = math.inf
        """How long the last batch of scores took."""

    # Starting

    def start(self, request: TrainRequest) -> Started:
        """Has a model trained: by a trainer that was started early for it, by an idle one, or by a new one.

        Raises:
            ClaimedError: another driver trains it.
        """
        name = trainer_name(request, self._store)
        self._claims.claim(request.ref, name)
        has_place = request.ref in self._early and request.label in self._placed
        if not has_place and (idle := self._idle.take(request.how)) is not None:
            if request.ref in self._early:
                self._kill_early(request.ref)
            return Started(self._train(idle.actor, request), idle.actor, idle.process, has_place=True)
        self._placed.discard(request.label)
        early = self._early.pop(request.ref, None)
        actor = self._new(request) if early is None else early[1]
        return Started(self._train(actor, request), actor, name, has_place)

    def take_over(self, running: dict[Any, Running]) -> None:
        """Has idle trainers train what waits at Ray for a place like theirs, the last first: the first gets the next
        place that Ray has."""
        for one in [one for one in reversed(running.values()) if one.trainer and one.may_lack_a_place]:
            request = one.batch[0]
            if not isinstance(request, TrainRequest) or (idle := self._idle.take(request.how)) is None:
                continue
            end_trainer(one.trainer, one.result)
            del running[one.result]
            one.result, one.trainer = self._train(idle.actor, request), idle.actor
            one.process, one.has_place = idle.process, True
            running[one.result] = one

    def _train(self, actor: Any, request: TrainRequest) -> Any:
        return actor.train.remote(request, self._store, self._retries, self._board)

    def _new(self, request: TrainRequest) -> Any:
        try:
            return TrainerActor.options(**trainer_options(request, self._store, self._retries)).remote()
        except ray.exceptions.ActorAlreadyExistsError as exc:  # which is still about to end
            self._claims.give_back(request.ref)
            raise ClaimedError(request.label) from exc

    def heard(self, label: str) -> None:
        """Notes that an actor that was started early is at work."""
        self._placed.add(label)

    def start_early(
        self, trainings: Sequence[TrainRequest], pending: Pending, running: Iterable[Running]
    ) -> None:
        """Starts the actors of trainings whose inputs will be there soon, in order,
        as far as nobody holds their place.

        Ends those that were started for trainings which are not among these any more.
        """
        self._end_early(but={request.ref for request in trainings})
        soon = list(self._follow_soon(trainings[: self._at_once], pending, running))
        if all(request.ref in self._early for request in soon):
            return
        free = dict(ray.available_resources())
        for early, *_ in self._early.values():
            if early.label not in self._placed:
                _take(free, early.how)
        for request in soon:
            if request.ref in self._early:
                continue
            if not _holds(free, request.how):
                return
            _take(free, request.how)
            try:
                self._claims.claim(request.ref, trainer_name(request, self._store))
                actor = self._new(request)
            except ClaimedError:
                continue
            self._early[request.ref] = (request, actor, actor.warm_up.remote(request, self._board))

    def _follow_soon(
        self, trainings: Sequence[TrainRequest], pending: Pending, running: Iterable[Running]
    ) -> Iterator[TrainRequest]:
        """The first trainings, up to one that comes later."""
        at_work = {request.ref: one for one in running for request in one.batch}
        not_started = {request.ref for request in pending.trainings}
        for request in trainings:
            before = pending.awaited_in_turn(request)
            are_few = 0 < len(before) <= SHORT_STEPS_PER_CPU * self._cpus
            is_soon = (
                are_few
                and not before & not_started
                and all(at_work[ref].ends_soon for ref in before & at_work.keys())
            )
            if request.how.workers > 1 or not (is_soon or request.ref in self._early):
                return
            yield request

    # Scoring

    def go_on(self, finished: Running, pending: Pending, running: Collection[Running]) -> Running | None:
        """Next batch of a trainer that has finished one: the scores of the model that it has trained.

        Without such scores it is idle, if it was alone. Scores that take all that it holds it computes in any case.
        """
        if finished.is_training:
            self._claims.give_back(finished.batch[0].ref)
        if finished.trainer is None or finished.how is None:
            return None
        if finished.how.workers > 1:  # the actor of a group holds nothing itself
            ray.kill(finished.trainer)
            return None
        now = time.monotonic()
        idle = Idle(finished.trainer, finished.how, finished.process, now, finished.may_train_on)
        if not finished.is_training:
            self._score_seconds = now - finished.started
        else:
            trained = finished.batch[0].ref
            fits = _is_as_large if self._is_place_wanted(pending, running) else _can_score
            batch = pending.next_batch(lambda request: fits(idle.how, request) and trained in request.needs)
            if batch:
                return self._score(idle, batch)
        self._idle.add(idle)
        return None

    def score_ready(self, pending: Pending, running: Collection[Running]) -> Iterator[Running]:
        """Has idle trainers score what is ready, a model each."""
        for idle in self._idle:
            if batch := pending.next_batch(partial(_may_score, idle.how, running)):
                self._idle.remove(idle)
                yield self._score(idle, batch)

    def will_score(self, request: StepRequest, running: Iterable[Running]) -> bool:
        """Whether a trainer that scores now will be free for this score sooner than a new process."""
        if self._score_seconds > START_SECONDS:
            return False
        at_work = [one.how for one in running if one.trainer is not None and not one.is_training and one.how]
        return any(_can_score(how, request) for how in at_work)

    def _score(self, idle: Idle, batch: list[StepRequest]) -> Running:
        result = idle.actor.score.remote(batch, self._store, self._board)
        return Running(batch, result, idle.actor, idle.how, idle.process)

    # Ending

    def end_unneeded(self, pending: Pending, running: Collection[Running]) -> None:
        """Ends idle trainers that are in the way, that nothing is left to score for (but those that are slow to
        start), or that were idle too long."""
        if not self._idle:
            return
        if self._is_place_wanted(pending, running):
            self._idle.end()
        else:
            self._idle.keep(to_score=pending.models_to_score)

    def begin_call(self) -> None:
        """Takes over the idle trainers of the last call."""
        self._idle.cancel_timer()

    def end_call(self, announced: Collection[TrainRequest], keeps_idle: bool) -> None:
        """Ends what the next call has no use for. It keeps those that were started early for announced trainings, and
        with `keeps_idle` idle ones, for a while."""
        if keeps_idle:
            self._idle.end_later()
        else:
            self._idle.end()
        kept = {request.ref for request in announced} & self._early.keys()
        self._end_early(but=kept)
        self._claims.give_back_all(but=kept)

    def end_all(self) -> None:
        """Ends all that are kept for a next call."""
        self._idle.cancel_timer()
        self.end_call((), keeps_idle=False)

    def _end_early(self, but: Collection[Ref]) -> None:
        for ref in [ref for ref in self._early if ref not in but]:
            self._kill_early(ref)
            self._claims.give_back(ref)

    def _kill_early(self, ref: Ref) -> None:
        request, actor, warm_up = self._early.pop(ref)
        end_trainer(actor, warm_up)
        self._placed.discard(request.label)

    def _is_place_wanted(self, pending: Pending, running: Iterable[Running]) -> bool:
        """Whether a training, or another step that runs in a group, waits or may have
        to wait for an idle trainer's place."""
        if any(request.ref not in self._early for request in pending.trainings):
            return True
        free = ray.available_resources()
        queued = [one.batch[0].group for one in running if one.may_lack_a_place]
        return not all(_holds(free, group) for group in queued if group is not None)


def _can_score(held: Resources, request: StepRequest) -> bool:
    """Whether a request is a score that can be computed in the place of such a
    trainer, with no CPU held for nothing."""
    if not isinstance(request, ScoreRequest):
        return False
    asked = request.how.gpus_per_worker
    return 0 < asked <= held.gpus_per_worker if asked else _is_as_large(held, request)


def _may_score(held: Resources, running: Iterable[Running], request: StepRequest) -> bool:
    return _can_score(held, request) and not would_hold_up_a_training(request, running)


def _is_as_large(held: Resources, request: StepRequest) -> bool:
    """Whether a request is a score that takes as much as such a trainer holds."""
    return isinstance(request, ScoreRequest) and bundle(request.how) == bundle(held)


def _holds(free: Mapping[str, float], asked: Resources) -> bool:
    return all(free.get(name, 0.0) >= asked.workers * amount - 1e-9 for name, amount in bundle(asked).items())


def _take(free: dict[str, float], asked: Resources) -> None:
    for name, amount in bundle(asked).items():
        free[name] = free.get(name, 0.0) - amount
