"""Runs a plan, as `btm run` does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from btm_cluster.driver.driver import Driver
from btm_cluster.operations.plan import check_run
from btm_cluster.operations.report import finish_run
from btm_cluster.operations.run import Run, run_plan
from btm_cluster.plan import Plan, read_plan
from btm_cluster.session import opened_driver, opened_view
from btm_cluster.terminal.logs import logging_of_library
from btm_cluster.workers.shadowing import check_shadowing


def run(
    plan: Plan | str | Path | Mapping[str, Any],
    *,
    in_process: bool = False,
    address: str | None = None,
    dashboard: bool = False,
    new_resources: bool = False,
) -> Run:
    """Grows the plan's forest and evaluates it, as `btm run` does; run again, it goes on where it was.

    Progress goes to standard error. Experts that failed are in the result's `failures`; the others are merged.
    The run's page is `logs/<run>/report.html` in the store.

    Args:
        plan: as `read_plan` gives it, or what that takes.
        in_process: without Ray, one step after the other.
        address: a Ray cluster to join, or `auto`; without it a local one is started.
        dashboard: serve the dashboard of a local cluster.
        new_resources: go on from training checkpoints with the plan's resources, not with those of their start.

    Raises:
        UserError: the plan, the text or the cluster will not do.
        StepError: not one expert could be trained.
        Stopped: SIGTERM or Ctrl-C came in the main thread, and what was trained is saved.
    """
    plan = as_plan(plan)
    check_shadowing()
    with opened_driver_of_call(plan, address, in_process, dashboard, new_resources) as driver:
        check_run(plan, driver)
        result = run_plan(plan, driver)
        finish_run(plan, driver, result)
        return result


@contextmanager
def opened_driver_of_call(
    plan: Plan, address: str | None, in_process: bool, dashboard: bool = False, new_resources: bool = False
) -> Iterator[Driver]:
    """A driver for one call. Progress goes to standard error, or to where the program's own logging has it go."""
    with (
        logging_of_library(),
        opened_view() as view,
        opened_driver(view, plan, address, in_process, dashboard, new_resources) as driver,
    ):
        yield driver


def as_plan(source: Plan | str | Path | Mapping[str, Any]) -> Plan:
    """A plan, or what `read_plan` takes, as a plan.

    Raises:
        PlanError: naming every field that is wrong.
    """
    return source if isinstance(source, Plan) else read_plan(source)
