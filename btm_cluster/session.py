"""A driver for one command or call, and what goes with it: workers, progress,
tracking, and signals that save first."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from btm_cluster.plan import Plan
from btm_cluster.plan.folder import refuse_in_jobs_copy
from btm_cluster.stopping import break_off, end_at_signals, handling
from btm_cluster.terminal.output import end_input

if TYPE_CHECKING:
    from btm_cluster.driver.capacity import Demand
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.run_events import RunEvents
    from btm_cluster.ledger import Ledger
    from btm_cluster.requests.progress import Progress, Watcher
    from btm_cluster.terminal.progress import ProgressView

log = logging.getLogger(__name__)
SAME_SECONDS = 0.5
"""Within these, a signal of the same kind is the one before."""
STOPPING = "stopping: trainings save first; a second Ctrl-C ends without that"


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
    command: str = "python",
) -> Iterator["Driver"]:
    """A driver for one command, whose process ends at the third signal."""
    end_input()
    with opened_driver(view, plan, address, in_process, dashboard, new_resources, True, command) as driver:
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
    command: str = "python",
) -> Iterator["Driver"]:
    """A driver for the plan's store. Ray is joined or started only once there is something to do.

    SIGTERM and Ctrl-C ask the trainings to save first, and end in Stopped; in a thread of a program's own
    they are not heard.
    """
    from btm_cluster.driver.budget import Budget, WorkersWithinBudget
    from btm_cluster.driver.driver import Driver
    from btm_cluster.driver.recipes import expert_resources
    from btm_cluster.driver.run_events import RunEvents
    from btm_cluster.driver.run_log import RunLog
    from btm_cluster.tracking.tracking import Tracking
    from btm_cluster.workers.in_process import InProcess, LocalControl
    from btm_cluster.workers.on_ray.lazily import LazyRayWorkers

    view.say("opening the store")
    ledger = open_ledger(plan.store)
    events = RunEvents(command)
    asked = _Asked(ends_process, events)
    with (
        Tracking(plan, ledger.storage, _each(view, events.watch), events.run) as watcher,
        handling(asked),
        RunLog(ledger, events, watcher.finish) as run_log,
        ExitStack() as stack,
    ):
        stack.callback(asked.tell_stop)
        budget = Budget(plan, ledger, events, watcher, asked.stop)
        workers: InProcess | LazyRayWorkers = InProcess(ledger, LocalControl(budget, asked.stop), events)
        open_search = None
        if not in_process:
            store, expert = ledger.storage.location, expert_resources(plan)
            lazy = LazyRayWorkers(
                store, budget, view.say, asked.stop, plan.cluster, expert, address, dashboard, events
            )
            workers = stack.enter_context(lazy)
            if "://" not in (address or ""):  # a Ray Client's trials could not be heard from here
                open_search = partial(lazy.open_search, show=view.table)
        view.runs_on(workers.at_once)

        def check_demands(demands: "Sequence[Demand]") -> None:
            budget.check(demands)
            workers.check_capacity(demands)

        within = WorkersWithinBudget(workers, budget)
        asked.driver = Driver(ledger, within, check_demands, new_resources, view, run_log, open_search)
        yield asked.driver


def local_driver(view: "ProgressView", store: str) -> "Driver":
    """A driver without a plan for a store that is there: steps run in this process."""
    end_input()
    from btm_cluster.driver.driver import Driver
    from btm_cluster.workers.in_process import InProcess, LocalControl

    ledger = open_ledger(store)
    return Driver(ledger, InProcess(ledger, LocalControl(view, threading.Event())), listener=view)


def open_ledger(store: str) -> "Ledger":
    """The ledger of a store that was found to be usable.

    Raises:
        UserError: it is not, or would not outlive the Ray job that this runs in.
    """
    from btm_cluster.ledger import Ledger

    ledger = Ledger.open(store)
    refuse_in_jobs_copy(ledger.storage.location)
    ledger.storage.check()
    return ledger


def dry_ledger(store: str) -> "Ledger":
    """A ledger over a store as it stands, which keeps in memory whatever is written to it."""
    from btm_cluster.ledger import Ledger
    from btm_cluster.workers.dry_run import Overlay

    return Ledger(Overlay(open_ledger(store).storage))


def _each(*watchers: "Watcher") -> "Watcher":
    """A watcher that passes on what it sees to several."""

    def watch(progress: "Progress") -> None:
        for one in watchers:
            one(progress)

    return watch


class _Asked:
    """Hears signals: the first one asks to save and stop, a second one to go
    without saving; a third ends the process, where it is a command's own.

    The same one at once is the same: `timeout` signals its command, and then the group that it is in.
    """

    def __init__(self, ends_process: bool, events: "RunEvents") -> None:
        self._ends_process, self._events = ends_process, events
        self.stop = threading.Event()
        self.stopped_at: float | None = None
        self.driver: Driver | None = None
        self._newest: tuple[int, float] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        newest, self._newest = self._newest, (number, time.monotonic())
        if newest is not None and newest[0] == number and self._newest[1] - newest[1] < SAME_SECONDS:
            return
        if self.stopped_at is not None:  # a budget that is spent asks to stop, too
            if self._ends_process:
                end_at_signals()
            self._break_off(number, frame)
            return
        self.stopped_at = self._events.now()
        self.stop.set()
        # The driver itself computes, and has nothing to save.
        if self.driver is None or not self.driver.is_asking:
            self._break_off(number, frame)
            return
        # By a thread: the main one may be in the middle of a line.
        threading.Thread(target=log.warning, args=(STOPPING,)).start()

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        break_off(number, frame)
        self._newest = None  # not yet: it comes again

    def tell_stop(self) -> None:
        """Tells the run's events of a stop that was asked for, once it is over."""
        if self.stopped_at is not None:
            self._events.add_stop(self.stopped_at)
