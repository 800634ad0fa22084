"""The workers' port, joined to a cluster at the first request: a run with nothing to do starts no Ray."""

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.port import Outcome, Search
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.plan import ClusterPlan, SearchPlan
from btm_cluster.requests import Resources, StepRequest, TrainRequest
from btm_cluster.requests.progress import Watcher
from btm_cluster.workers.disk_and_memory import check_this_machine
from btm_cluster.workers.machine import check_compiler

if TYPE_CHECKING:
    from btm_cluster.workers.on_ray.workers import RayWorkers

# Ray reads these once, when it is imported, so they are set before.
_ENVIRONMENT = {
    # Train polls its workers; its default of 2 s costs a small run much.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # shows Train's runs in the dashboard
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # groups queue for GPUs
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's table goes through a reporter of ours, and not to standard output
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files of results, which nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that diverges before its first rung has no result
}
# What Ray does by itself for a local cluster, without its warning.
_LOCAL_ENVIRONMENT = {"RAY_AUTH_MODE": "token"}


def set_environment(address: str | None) -> None:
    """Ray's settings for a cluster that is joined or, without an address, started here: before it is
    imported."""
    for name, value in (_ENVIRONMENT | (_LOCAL_ENVIRONMENT if address is None else {})).items():
        os.environ.setdefault(name, value)


class LazyRayWorkers:
    """RayWorkers, connected when first asked for something, disconnected on exit."""

    def __init__(
        self,
        store: str,
        watcher: Watcher,
        say: Callable[[str], None],
        stop: threading.Event,
        cluster: ClusterPlan,
        expert: Resources,
        address: str | None,
        dashboard: bool,
        events: RunEvents | None = None,
    ) -> None:
        self._say = say
        if address is None:  # which never grows
            cluster = cluster.model_copy(update={"autoscaling": False})
        self._arguments = (store, watcher, stop, cluster, expert, events or RunEvents())
        self._address, self._dashboard, self._may_grow = address, dashboard, cluster.autoscaling
        self._stack = ExitStack()
        self._workers: RayWorkers | None = None

    def __enter__(self) -> "LazyRayWorkers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check_capacity(self, demands: Sequence[Demand]) -> None:
        if demands:
            if self._address is None:
                check_this_machine(demands)
                check_compiler(demands)
            self._connected().check_capacity(demands)
            if self._address is not None and not self._may_grow:
                from btm_cluster.workers.on_ray.gpu_memory import check_gpu_memory

                check_gpu_memory(demands)

    def get_ready(self, trainings: Sequence[TrainRequest]) -> None:
        if trainings:
            self._connected().get_ready(trainings)

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        return self._connected().run(requests)

    def open_search(self, space: SearchPlan, show: Callable[[str], None]) -> AbstractContextManager[Search]:
        """A search by Ray Tune on the cluster; `show` is given Tune's table whenever it changes."""
        self._connected()
        from btm_cluster.workers.on_ray.tuning import searching

        return searching(space, show)

    def at_once(self, group: Resources | None) -> int:
        """How many groups the cluster can hold at once, as it stands; one, while none is joined."""
        return 1 if self._workers is None else self._workers.at_once(group)

    def _connected(self) -> "RayWorkers":
        if self._workers is None:
            self._say(
                "starting Ray" if self._address is None else f"joining the Ray cluster at {self._address}"
            )
            set_environment(self._address)
            from btm_cluster.workers.on_ray.cluster import connected
            from btm_cluster.workers.on_ray.workers import RayWorkers

            self._stack.enter_context(connected(self._address, self._dashboard))
            self._workers = RayWorkers(*self._arguments)
            self._stack.callback(self._workers.close)
            self._say("waiting for the first step to start")
        return self._workers
