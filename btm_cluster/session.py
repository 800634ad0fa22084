"""A driver for one command or call, and what goes with it: workers, progress,
tracking, and signals that save first."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from btm_cluster.plan import Plan
from btm_cluster.stopping import end_at_signals, handling, stopped
from btm_cluster.terminal.output import end_input

if TYPE_CHECKING:
    from btm_cluster.driver.driver import Driver
    from btm_cluster.ledger import Ledger
    from btm_cluster.terminal.progress import ProgressView


@contextmanager
def opened_view() -> Iterator["ProgressView"]:
    """The progress of a command or call, to be opened before what takes seconds to import."""
    from btm_cluster.terminal.progress import ProgressView
    from btm_cluster.terminal.tables import progress_console

    with ProgressView(progress_console()) as view:
        view.say("loading PyTorch")
        yield view


@contextmanager
def driving(
    view: "ProgressView",
    plan: Plan,
    address: str | None,
    in_process: bool,
    dashboard: bool = False,
    new_resources: bool = False,
) -> Iterator["Driver"]:
    """A driver for one command, whose process ends at the third signal."""
    end_input()
    with opened_driver(view, plan, address, in_process, dashboard, new_resources, True) as driver:
        yield driver


@contextmanager
def opened_driver(
    view: "ProgressView",
    plan: Plan,
    address: str | None,
    in_process: bool,
    dashboard: bool = False,
    new_resources: bool = False,
    ends_process: bool = False,
) -> Iterator["Driver"]:
    """A driver for the plan's store. Ray is joined or started only once there is something to do.

    SIGTERM and Ctrl-C ask the trainings to save first, and end in Stopped; in a thread of a program's own
    they are not heard.
    """
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.recipes import expert_resources
    from btm_cluster.tracking.tracking import Tracking
    from btm_cluster.workers.in_process import InProcess, LocalControl
    from btm_cluster.workers.on_ray.lazily import LazyRayWorkers

    view.say("opening the store")
    ledger = open_ledger(plan.store)
    asked = _Asked(ends_process)
    with (
        Tracking(plan, ledger.storage, view) as watcher,
        handling(asked),
        ExitStack() as stack,
    ):
        workers: InProcess | LazyRayWorkers = InProcess(ledger, LocalControl(watcher, asked.stop))
        if not in_process:
            store, expert = ledger.storage.location, expert_resources(plan)
            lazy = LazyRayWorkers(
                store, watcher, view.say, asked.stop, plan.cluster, expert, address, dashboard
            )
            workers = stack.enter_context(lazy)
        view.runs_on(workers.at_once)
        asked.driver = Driver(ledger, workers, workers.check_capacity, new_resources, view)
        yield asked.driver


def local_driver(view: "ProgressView", store: str) -> "Driver":
    """A driver without a plan for a store that is there: steps run in this process."""
    end_input()
    from btm_cluster.driver.driver import Driver
    from btm_cluster.workers.in_process import InProcess, LocalControl

    ledger = open_ledger(store)
    return Driver(ledger, InProcess(ledger, LocalControl(view, threading.Event())), listener=view)


def open_ledger(store: str) -> "Ledger":
    """The ledger of a store that was found to be usable."""
    from btm_cluster.ledger import Ledger

    ledger = Ledger.open(store)
    ledger.storage.check()
    return ledger


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
