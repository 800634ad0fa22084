"""A driver for one command or call, and what goes with it: workers, progress,
tracking, and signals that save first."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from btm_cluster.errors import UserError
from btm_cluster.plan import Plan
from btm_cluster.stopping import end_at_signals, handling, stopped
from btm_cluster.terminal.output import end_input

if TYPE_CHECKING:
    from rich.console import Console

    from btm_cluster.driver.capacity import Demand
    from btm_cluster.driver.driver import Driver
    from btm_cluster.ledger import Ledger

_JOBS_COPY = "/working_dir_files/_ray_pkg_"
"""In paths of what `ray job submit --working-dir` carried."""


@contextmanager
def driving(
    plan: Plan,
    address: str | None,
    in_process: bool,
    dashboard: bool,
    json_output: bool,
    new_resources: bool = False,
) -> Iterator["Driver"]:
    """A driver for one command, whose process ends at the third signal."""
    end_input()
    from btm_cluster.terminal.tables import consoles

    progress = consoles(json_output)[1]
    with opened_driver(plan, address, in_process, progress, dashboard, new_resources, True) as driver:
        yield driver


@contextmanager
def opened_driver(
    plan: Plan,
    address: str | None,
    in_process: bool,
    progress: "Console",
    dashboard: bool = False,
    new_resources: bool = False,
    ends_process: bool = False,
) -> Iterator["Driver"]:
    """A driver for the plan's store. Ray is joined or started only once there is something to do.

    SIGTERM and Ctrl-C ask the trainings to save first, and end in Stopped; in a thread of a program's own
    they are not heard.
    """
    from btm_cluster.driver.budget import Meter, MeteredWorkers
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.recipes import expert_resources
    from btm_cluster.terminal.progress import ProgressView
    from btm_cluster.tracking.tracking import Tracking
    from btm_cluster.workers.in_process import InProcess, LocalControl
    from btm_cluster.workers.on_ray.lazily import LazyRayWorkers

    ledger = open_ledger(plan.store)
    asked = _Asked(ends_process)
    with (
        ProgressView(progress) as view,
        Tracking(plan, ledger.storage, view) as watcher,
        handling(asked),
        ExitStack() as stack,
    ):
        meter = Meter(plan, ledger.storage, watcher, asked.stop)
        workers: InProcess | LazyRayWorkers = InProcess(ledger, LocalControl(meter, asked.stop))
        if not in_process:
            store, expert = ledger.storage.location, expert_resources(plan)
            lazy = LazyRayWorkers(store, meter, asked.stop, plan.cluster, expert, address, dashboard)
            workers = stack.enter_context(lazy)
        metered = MeteredWorkers(workers, meter, ledger)

        def check_demands(demands: "Sequence[Demand]") -> None:
            metered.check_budget(demands)
            workers.check_capacity(demands)

        asked.driver = Driver(ledger, metered, check_demands, new_resources)
        yield asked.driver


def local_driver(store: str) -> "Driver":
    """A driver without a plan for a store that is there: steps run in this process, and show no progress."""
    end_input()
    from btm_cluster.driver.driver import Driver
    from btm_cluster.workers.in_process import InProcess, LocalControl

    ledger = open_ledger(store)
    return Driver(ledger, InProcess(ledger, LocalControl(lambda _: None, threading.Event())))


def open_ledger(store: str) -> "Ledger":
    """The ledger of a store that was found to be usable.

    Raises:
        UserError: it is not, or would not outlive the Ray job that this runs in.
    """
    from btm_cluster.ledger import Ledger

    ledger = Ledger.open(store)
    if _JOBS_COPY in ledger.storage.location:
        raise UserError(
            "the store would be deleted with this job",
            found=f"{ledger.storage.location}, in the job's own copy of its working directory",
            expected="a bucket, or an absolute path that all nodes share",
            remedy="write such a `store` into the plan",
        )
    ledger.storage.check()
    return ledger


def dry_ledger(store: str) -> "Ledger":
    """A ledger over a store as it stands, which keeps in memory whatever is written to it."""
    from btm_cluster.ledger import Ledger
    from btm_cluster.workers.dry_run import Overlay

    return Ledger(Overlay(open_ledger(store).storage))


class _Asked:
    """Hears signals: the first one asks to save and stop, a second one to go
    without saving; a third ends the process, where it is a command's own."""

    def __init__(self, ends_process: bool) -> None:
        self._ends_process = ends_process
        self.stop = threading.Event()
        self.driver: Driver | None = None

    def __call__(self, *_: object) -> None:
        if self.stop.is_set():
            if self._ends_process:
                end_at_signals()
            raise stopped()
        self.stop.set()
        # The driver itself computes, and has nothing to save.
        if self.driver is None or not self.driver.is_asking:
            raise stopped()
