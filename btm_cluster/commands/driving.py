"""What commands that work on a plan have in common: their options, and a driver that saves when it is asked to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btm_cluster.commands.forest import open_ledger
from btm_cluster.errors import Stopped
from btm_cluster.plan import Plan

if TYPE_CHECKING:
    from btm_cluster.driver import Driver

PlanPath = Annotated[Path, typer.Argument(help="The plan, a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, progress on standard error.")]
Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster to join, or auto; without it a local one is started."),
]
InProcess = Annotated[bool, typer.Option("--in-process", help="Without Ray, one step after the other.")]
Dashboard = Annotated[bool, typer.Option("--dashboard", help="Serve the Ray dashboard of a local cluster.")]


@contextmanager
def driving(
    plan: Plan, address: str | None, in_process: bool, dashboard: bool, json_output: bool
) -> Iterator["Driver"]:
    """A driver for the plan's store. Ray is joined or started only once there is something to do.

    SIGTERM and Ctrl-C ask the trainings to save first, and end in Stopped.
    """
    from btm_cluster.display import ProgressView, consoles
    from btm_cluster.driver import Driver
    from btm_cluster.tracking import Tracking

    ledger = open_ledger(plan.store)
    stop = threading.Event()
    with (
        ProgressView(consoles(json_output)[1]) as view,
        Tracking(plan, ledger.storage, view) as watcher,
    ):
        if in_process:
            from btm_cluster.in_process import InProcess, LocalControl

            driver = Driver(ledger, InProcess(ledger, LocalControl(watcher, stop)))
            with _stop_on_signals(stop, driver):
                yield driver
        else:
            from btm_cluster.on_ray.lazily import LazyRayWorkers
            from btm_cluster.recipes import expert_resources

            store, expert = ledger.storage.location, expert_resources(plan)
            with LazyRayWorkers(store, watcher, stop, plan.cluster, expert, address, dashboard) as workers:
                driver = Driver(ledger, workers)
                with _stop_on_signals(stop, driver):
                    yield driver


@contextmanager
def _stop_on_signals(stop: threading.Event, driver: "Driver") -> Iterator[None]:
    def ask(*_: object) -> None:
        if stop.is_set():  # asked twice: do not save, go
            raise KeyboardInterrupt
        stop.set()
        if not driver.is_asking:  # the driver itself computes, and has nothing to save
            raise Stopped("the run was stopped", remedy="the same command goes on from here")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
