"""The workers' port on Ray: a named actor for each training, one for averages, a task for every other step.

Steps wait here for the inputs that others of the same call make, and trainings for `concurrent_experts`;
everything else is Ray's. A failed request never cancels its siblings.
"""

import sys
import threading
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.driver.capacity import Demand, bundle, demand_of, groups_held
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.errors import UserError
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.plan import ClusterPlan
from btm_cluster.requests import AverageRequest, MergeRequest, Resources, StepRequest, TrainRequest
from btm_cluster.requests.progress import Phase, Progress, Watcher
from btm_cluster.steps.registry import STEPS
from btm_cluster.stopping import stopped
from btm_cluster.storage.store_calls import take_store_calls
from btm_cluster.workers.on_ray.chronicle import Chronicle
from btm_cluster.workers.on_ray.claims import ClaimedError
from btm_cluster.workers.on_ray.cluster import has_capacity, live_nodes
from btm_cluster.workers.on_ray.failures import failure_of, log_of
from btm_cluster.workers.on_ray.metrics import Metrics
from btm_cluster.workers.on_ray.progress import News, ProgressBoardActor
from btm_cluster.workers.on_ray.running import Running, would_hold_up_a_training
from btm_cluster.workers.on_ray.spans import Worked
from btm_cluster.workers.on_ray.supervision import WARMING_UP, Kill, Limits, supervise, waiting_note
from btm_cluster.workers.on_ray.tasks import MergerActor, await_other_task, step_task
from btm_cluster.workers.on_ray.trainers import Trainers
from btm_cluster.workers.on_ray.training import trainer_name
from btm_cluster.workers.pending import Pending

POLL_SECONDS = 0.25


class RayWorkers:
    """The port for a connected Ray cluster. `stop` is set when the driver was asked to stop."""

    def __init__(
        self,
        store: str,
        watcher: Watcher,
        stop: threading.Event,
        cluster: ClusterPlan,
        expert: Resources,
        events: RunEvents,
    ) -> None:
        self._store, self._watcher, self._stop = store, watcher, stop
        self._cluster, self._expert = cluster, expert
        # On the driver's own node: another may be lost, and the driver would be lost with what it asks every
        # moment.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._board = ProgressBoardActor.options(name=f"progress-{time.time_ns()}", **board).remote()
        self._metrics, self._chronicle = Metrics(store), Chronicle(events, store)
        self._to_train: dict[Ref, TrainRequest] = {}
        self._retried = {"max_restarts": cluster.retries, "max_task_retries": -1}
        self._merger: Any = None
        self._merger_name = ""
        self._trainers = Trainers(store, cluster, self._board)
        self._announced: list[TrainRequest] = []
        self._nodes: list[dict[str, float]] = []
        """Resources of the cluster's nodes as this call began."""
        self._fits_now: Mapping[str, bool] = {}
        """Whether the cluster as it stands can hold a training of this call, by label."""

    def check_capacity(self, demands: Sequence[Demand]) -> None:
        if self._stop.is_set():
            raise stopped()
        for demand in demands:
            has_capacity(demand, self._cluster.autoscaling)

    def at_once(self, group: Resources | None) -> int:
        """How many such groups the cluster could hold at once when steps were last asked for; None is one CPU."""
        if group is None:
            return max(1, int(sum(node.get("CPU", 0.0) for node in self._nodes)))
        return max(1, min(groups_held(self._nodes, group), self._cluster.concurrent_experts or sys.maxsize))

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        self._announced = list(trainings)

    def close(self) -> None:
        """Ends what is kept for another call."""
        self._trainers.end_all()

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        self._fits_now = self._check_trainings(
            [request for request in requests if isinstance(request, TrainRequest)]
        )
        self._nodes = live_nodes()
        self._metrics.stands(Ledger.open(self._store).log.newest())
        announced, self._announced = self._announced, []
        trainings = [request for request in (*requests, *announced) if isinstance(request, TrainRequest)]
        self._to_train = {request.ref: request for request in trainings}
        pending, running = Pending(requests), dict[Any, Running]()
        self._trainers.begin_call()
        try:
            while pending or running:
                if self._stop.is_set():
                    self._stop_all(running.values())
                    raise stopped()
                self._start_all(pending, running, announced)
                done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                self._relay(running.values())
                for result in done:
                    finished = running[result]
                    yield from self._finish(finished, pending)
                    del running[result]
                    if follower := self._trainers.go_on(finished, pending, running.values()):
                        running[follower.result] = follower
                self._end_idle_merger(pending, running.values())
        except (UserError, GeneratorExit):  # a mistake, met here or by whoever asked, costs no training
            self._stop_all(running.values())
            raise
        finally:
            self._chronicle.given_up(running.values())
            for one in running.values():
                one.end()
            self._trainers.end_call(announced, keeps_idle=not pending and not running)
            self._end_merger()

    def _start_all(
        self, pending: Pending, running: dict[Any, Running], announced: Sequence[TrainRequest]
    ) -> None:
        """Starts every request whose inputs and turn are there, trainings first, and the processes
        of trainings that follow soon."""
        self._trainers.take_over(running)
        while batch := pending.next_batch(
            lambda request: isinstance(request, TrainRequest) and self._may_start(request, running.values())
        ):
            started = self._start(batch)
            running[started.result] = started
        for scores in self._trainers.score_ready(pending, list(running.values())):
            running[scores.result] = scores
        while batch := pending.next_batch(lambda request: self._may_start(request, running.values())):
            started = self._start(batch)
            running[started.result] = started
        self._trainers.end_unneeded(pending, running.values())
        self._trainers.start_early([*pending.trainings, *announced], pending, running.values())

    def _may_start(self, request: StepRequest, running: Iterable[Running]) -> bool:
        if isinstance(request, AverageRequest):  # those that get ready meanwhile are then made in one pass
            return all(one.batch[0].batch != request.batch for one in running)
        if not isinstance(request, TrainRequest):
            waits = would_hold_up_a_training(request, running)
            return not waits and not self._trainers.will_score(request, running)
        trainings = [one for one in running if one.is_training and one.trainer is not None]
        # Ray may place the later of two: a baseline is submitted once every expert before it has its place.
        queued = [one.batch[0].priority for one in trainings if one.state.phase == "queued"]
        at_once = self._cluster.concurrent_experts or len(trainings) + 1
        return len(trainings) < at_once and all((number or 0) >= request.priority for number in queued)

    def _finish(self, finished: Running, pending: Pending) -> Iterator[tuple[StepRequest, Outcome]]:
        """Every request of a batch with its outcome, and those that can never start because of it."""
        outcomes = self._collect(finished)
        if outcomes is None:  # another driver left it unfinished: ours now
            pending.put_back(finished.batch[0])
        elif isinstance(outcomes[0], Failure) and pending.take_apart(finished.batch):
            return
        for request, outcome in zip(finished.batch, outcomes or (), strict=outcomes is not None):
            self._metrics.ended(
                request.label, STEPS[type(request)].function, failed=isinstance(outcome, Failure)
            )
            yield request, outcome
            yield from pending.finish(request, outcome)
        if finished.is_training:  # whoever asked may have merged it
            self._metrics.stands(Ledger.open(self._store).log.newest())

    def _end_idle_merger(self, pending: Pending, running: Collection[Running]) -> None:
        """Ends the merge actor where there is nothing to average, for good or while a
        training waits for the CPU that it holds."""
        merges = any(isinstance(one.batch[0], MergeRequest) for one in running)
        trainings = pending.trainings or any(one.is_training and one.may_lack_a_place for one in running)
        if not merges and (trainings or not pending.merges):
            self._end_merger()

    def _end_merger(self) -> None:
        if self._merger is not None:
            ray.kill(self._merger)
            self._merger = None

    def _check_trainings(self, requests: Sequence[TrainRequest]) -> dict[str, bool]:
        """Whether the cluster as it stands has room for each training, by label.

        Raises:
            ResourcesError: it never will have.
        """
        if any(request.role == "seed" or request.milestones for request in requests):
            # Before its seed is paid for.
            has_capacity(Demand("an expert", self._expert), self._cluster.autoscaling)
        return {
            request.label: has_capacity(demand_of(request), self._cluster.autoscaling) for request in requests
        }

    def _start(self, batch: list[StepRequest]) -> Running:
        request, step = batch[0], STEPS[type(batch[0])]
        options: dict[str, Any]
        if isinstance(request, TrainRequest):
            return self._start_training(request)
        if step.runs_in == "merger":
            if self._merger is None:
                self._merger_name = f"merge-{time.time_ns()}"
                options = {"name": self._merger_name, "num_cpus": 1, **self._retried}
                self._merger = MergerActor.options(**options).remote()
            result = self._merger.average.remote(batch, self._store, self._board)
            return Running(batch, result, process=self._merger_name)
        options = {"name": f"{step.function} {request.label}", "max_retries": self._cluster.retries}
        waits_for = ""
        if request.group is None:
            options["num_cpus"] = 1
        else:
            alone = Demand(request.shown, replace(request.group, workers=1))
            waits_for = "" if has_capacity(alone, self._cluster.autoscaling) else self._say_what_waits(alone)
            held = bundle(alone.how)
            options |= {"num_cpus": held["CPU"], "num_gpus": held.get("GPU", 0)}
        result = step_task.options(**options).remote(batch, self._store, self._board)
        return Running(batch, result, waits_for=waits_for)

    def _start_training(self, request: TrainRequest) -> Running:
        try:
            started = self._trainers.start(request)
        except ClaimedError:
            self._watcher(Progress(request.label, "waiting", note="for another driver, which trains it"))
            name = trainer_name(request, self._store)
            return Running([request], await_other_task.remote(request, self._store, name))
        self._metrics.asked(request)
        waits_for = ""
        if not started.has_place and self._fits_now[request.label]:
            note = "for a free GPU" if request.how.gpus_per_worker else "for free CPUs"
            self._watcher(Progress(request.label, "waiting", note=note))
        elif not started.has_place:
            waits_for = self._say_what_waits(demand_of(request))
        running = Running([request], started.result, started.actor, request.how, started.process, waits_for)
        running.has_place = started.has_place
        return running

    def _say_what_waits(self, demand: Demand) -> str:
        self._watcher(Progress(demand.label, "waiting", note=waiting_note(demand.description)))
        return demand.description

    def _collect(self, finished: Running) -> list[Outcome] | None:
        """An outcome for each request of the batch. None: another driver's training came to nothing."""
        try:
            worked: Worked | None = ray.get(finished.result)
            finished.may_train_on = worked is not None and worked.may_train_on
        except ray.exceptions.RayError as exc:
            attempts, host = ray.get(self._board.attempts_and_host.remote(finished.label))
            log = log_of(finished.trainer)
            finished.end()
            finished.trainer = None
            failures = [failure_of(one.label, exc, attempts, host, log) for one in finished.batch]
            self._chronicle.ended(finished, failures, ())
            return [*failures]
        self._chronicle.ended(finished, (), worked.spans if worked else ())
        return None if worked is None else [*worked.artifacts]

    def _relay(self, running: Iterable[Running]) -> None:
        """Passes progress on to the watcher, says what waits for room, and kills what hangs."""
        news: News = ray.get(self._board.take.remote())
        fresh = {progress.label: progress for progress in news.progress}
        for progress in fresh.values():
            if progress.phase == WARMING_UP:
                self._trainers.heard(progress.label)
            self._metrics.heard(progress, news.attempts[progress.label])
            self._watcher(progress)
        self._chronicle.heard(news, running, self._to_train)
        for store_calls in (news.store_calls, take_store_calls()):
            self._metrics.count_store_calls(store_calls)
        self._metrics.renew()
        limits = Limits(60 * self._cluster.hang_minutes)
        for one in running:
            if (news_of := fresh.get(one.label)) is not None:
                one.has_place = True
                one.seconds_left = one.seconds_left if news_of.seconds_left is None else news_of.seconds_left
            one.state, action = supervise(one.state, fresh.get(one.label), time.monotonic(), limits)
            if action is not None:
                phase: Phase = "hanging" if isinstance(action, Kill) else "waiting"
                self._watcher(Progress(one.label, phase, note=action.note))
            if isinstance(action, Kill):
                for process in ray.get(self._board.processes.remote(one.label)):
                    process.kill()

    def _stop_all(self, running: Iterable[Running]) -> None:
        """Asks every trainer that makes updates to save and stop, and waits for them as long as the plan allows."""
        trainings = [one for one in running if one.trainer is not None and one.state.phase == "updating"]
        for one in trainings:
            self._watcher(Progress(one.label, "saving", note="to stop"))
            one.trainer.stop.remote()
        if trainings:
            results = [one.result for one in trainings]
            ray.wait(results, num_returns=len(results), timeout=self._cluster.stop_grace_seconds)
