"""The workers' port on Ray: tasks for preparing, scoring, mixing and searching, a named actor for each training, one for averaging.

Admission is `concurrent_experts` and `ray.wait`; everything else is Ray's. A failed request never cancels its siblings.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import ray
import ray.util.state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.ledger import Ledger
from btm_cluster.on_ray.cluster import has_room
from btm_cluster.on_ray.failures import LOG_LINES, failure_of
from btm_cluster.on_ray.metrics import Metrics
from btm_cluster.on_ray.progress import News, ProgressBoardActor
from btm_cluster.on_ray.supervision import Kill, Limits, StepState, supervise, waiting_message
from btm_cluster.on_ray.tasks import MergerActor, await_other_task, mix_task, prepare_task, score_task, soup_task
from btm_cluster.on_ray.training import TrainerActor, trainer_options
from btm_cluster.plan import ClusterPlan
from btm_cluster.requests import (
    AverageRequest,
    MixRequest,
    PrepareRequest,
    Resources,
    ScoreRequest,
    SoupRequest,
    TrainRequest,
)
from btm_cluster.room import Ask, ask_of, bundle
from btm_cluster.stopping import stopped
from btm_cluster.storage.requests import take_requests
from btm_cluster.workers import Failure, Outcome, Progress, Watcher

POLL_SECONDS = 0.25


@dataclass
class _Running:
    """Something under way: what it is called, its result to come, and the trainer actor where it has one."""

    label: str
    result: Any
    trainer: Any = None
    waits_for: InitVar[str] = ""
    """Capacity that the cluster lacked when this was submitted."""
    state: StepState = field(init=False)

    def __post_init__(self, waits_for: str) -> None:
        self.state = StepState.submitted(time.monotonic(), self.trainer is not None, waits_for)


class RayWorkers:
    """The port for a connected Ray cluster. `stop` is set when the driver was asked to stop."""

    def __init__(
        self, store: str, watcher: Watcher, stop: threading.Event, cluster: ClusterPlan, expert: Resources
    ) -> None:
        self._store, self._watcher, self._stop, self._cluster, self._expert = store, watcher, stop, cluster, expert
        # On the driver's own node: another may be lost, and the driver would be lost with what it asks every moment.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._board = ProgressBoardActor.options(name=f"progress-{time.time_ns()}", **board).remote()
        self._metrics = Metrics(store)
        self._retried = {"max_restarts": cluster.retries, "max_task_retries": -1}

    def check_room(self, asks: Sequence[Ask]) -> None:
        if self._stop.is_set():
            raise stopped()
        for ask in asks:
            has_room(ask, self._cluster.autoscaling)

    def prepare(self, requests: Sequence[PrepareRequest]) -> list[Outcome]:
        return self._run("prepare", self._on_one_cpu(prepare_task), requests)

    def train(self, requests: Sequence[TrainRequest]) -> list[Outcome]:
        if any(request.role == "seed" or request.milestones for request in requests):
            has_room(Ask("an expert", self._expert), self._cluster.autoscaling)  # before its seed is paid for
        room = {request.label: has_room(ask_of(request), self._cluster.autoscaling) for request in requests}

        def start(request: TrainRequest) -> _Running:
            options = trainer_options(request, self._store, self._cluster.retries)
            try:
                trainer = TrainerActor.options(**options).remote()
            except ValueError:  # the name is taken
                self._watcher(Progress(request.label, "waiting for another driver, which trains it"))
                return _Running(request.label, await_other_task.remote(request, self._store, options["name"]))
            result = trainer.train.remote(request, self._store, self._cluster.retries, self._board)
            self._metrics.asked(request)
            waits_for = "" if room[request.label] else self._say_what_waits(ask_of(request))
            return _Running(request.label, result, trainer, waits_for)

        return self._run("train", start, requests, self._cluster.concurrent_experts)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        groups: dict[str, list[ScoreRequest]] = {}
        for request in requests:
            groups.setdefault(request.model.identity, []).append(request)

        def start(group: list[ScoreRequest]) -> _Running:
            return self._start_task(score_task, group[0].label, group[0].how, group)

        outcomes = self._run("score", start, list(groups.values()))
        by_request: dict[str, Outcome] = {}
        for group, outcome in zip(groups.values(), outcomes, strict=True):
            each = [outcome] * len(group) if isinstance(outcome, Failure) else outcome
            by_request |= {r.ref.identity: o for r, o in zip(group, each, strict=True)}
        return [by_request[request.ref.identity] for request in requests]

    def mix(self, requests: Sequence[MixRequest]) -> list[Outcome]:
        return self._run("mix", self._on_one_cpu(mix_task), requests)

    def average(self, requests: Sequence[AverageRequest]) -> list[Outcome]:
        merger = MergerActor.options(name=f"merge-{time.time_ns()}", num_cpus=1, **self._retried).remote()

        def start(request: AverageRequest) -> _Running:
            return _Running(request.label, merger.average.remote(request, self._store, self._board))

        try:
            return self._run("average", start, requests)
        finally:
            ray.kill(merger)

    def soup(self, requests: Sequence[SoupRequest]) -> list[Outcome]:
        def start(request: SoupRequest) -> _Running:
            return self._start_task(soup_task, request.label, request.how, request)

        return self._run("soup", start, requests)

    def _on_one_cpu(self, step: Any) -> Callable[[Any], _Running]:
        task = step.options(num_cpus=1, max_retries=self._cluster.retries)
        return lambda request: _Running(request.label, task.remote(request, self._store, self._board))

    def _start_task(self, step: Any, label: str, how: Resources, asked: Any) -> _Running:
        """Starts a step that holds what one worker does."""
        alone = Ask(label, replace(how, workers=1))
        waits_for = "" if has_room(alone, self._cluster.autoscaling) else self._say_what_waits(alone)
        held = bundle(alone.how)
        task = step.options(num_cpus=held["CPU"], num_gpus=held.get("GPU", 0), max_retries=self._cluster.retries)
        return _Running(label, task.remote(asked, self._store, self._board), waits_for=waits_for)

    def _say_what_waits(self, ask: Ask) -> str:
        self._watcher(Progress(ask.label, waiting_message(ask.words)))
        return ask.words

    def _run(
        self, verb: str, start: Callable[[Any], _Running], requests: Sequence[Any], at_once: int | None = None
    ) -> list[Any]:
        """Starts what there is room for, waits for all of it, and returns results or Failures in order."""
        self._metrics.stands(Ledger.open(self._store).log.newest())
        outcomes: dict[int, Any] = {}
        waiting = dict(enumerate(requests))
        running: dict[Any, tuple[int, _Running]] = {}
        try:
            while waiting or running:
                if self._stop.is_set():
                    self._stop_all([one for _, one in running.values()])
                    raise stopped()
                while waiting and len(running) < (at_once or len(requests)):
                    index = next(iter(waiting))
                    started = start(waiting.pop(index))
                    running[started.result] = (index, started)
                done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                self._relay([one for _, one in running.values()])
                for result in done:
                    index, finished = running.pop(result)
                    outcome = self._collect(finished)
                    if outcome is None:  # another driver left it unfinished: ours now
                        waiting[index] = requests[index]
                    else:
                        outcomes[index] = outcome
                        self._metrics.ended(finished.label, verb, failed=isinstance(outcome, Failure))
        finally:
            for _, one in running.values():
                _end(one)
        return [outcomes[i] for i in range(len(requests))]

    def _collect(self, finished: _Running) -> Any:
        """The result, or the Failure that it ended in; a trainer's process goes with it."""
        try:
            return ray.get(finished.result)
        except ray.exceptions.RayError as exc:
            attempts, host = ray.get(self._board.story.remote(finished.label))
            return failure_of(finished.label, exc, attempts, host, _log_of(finished.trainer))
        finally:
            _end(finished)

    def _relay(self, running: Sequence[_Running]) -> None:
        """Passes progress on to the watcher, says what waits for room, and kills what hangs."""
        news: News = ray.get(self._board.take.remote())
        fresh = {progress.label: progress for progress in news.progress}
        for progress in fresh.values():
            self._metrics.heard(progress, news.attempts[progress.label])
            self._watcher(progress)
        for requests in (news.requests, take_requests()):
            self._metrics.requested(requests)
        self._metrics.renew()
        limits = Limits(60 * self._cluster.hang_minutes)
        for one in running:
            one.state, action = supervise(one.state, fresh.get(one.label), time.monotonic(), limits)
            if action is not None:
                self._watcher(Progress(one.label, action.message))
            if isinstance(action, Kill):
                for process in ray.get(self._board.processes.remote(one.label)):
                    process.kill()

    def _stop_all(self, running: Sequence[_Running]) -> None:
        """Asks every trainer to save and stop, and waits for them as long as the plan allows."""
        trainings = [one for one in running if one.state.phase == "updating"]
        for one in trainings:
            self._watcher(Progress(one.label, "saving, to stop"))
            one.trainer.stop.remote()
        if trainings:
            results = [one.result for one in trainings]
            ray.wait(results, num_returns=len(results), timeout=self._cluster.stop_grace_seconds)


def _log_of(trainer: Any) -> str:
    """The end of what a trainer's process logged, where the cluster serves logs."""
    if trainer is None:
        return ""
    try:
        lines = ray.util.state.get_log(actor_id=trainer._actor_id.hex(), tail=LOG_LINES, suffix="err", timeout=10)
        return "".join(lines)
    except Exception:  # a cluster without a dashboard serves none, and that is no reason to fail
        return ""


def _end(one: _Running) -> None:
    if one.trainer is not None:
        ray.kill(one.trainer)
    else:
        ray.cancel(one.result, force=False)
