"""Runs a plan, as `btm run` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btm_cluster.operations.plan import check_run
from btm_cluster.operations.report import finish_run
from btm_cluster.operations.run import Run, run_plan
from btm_cluster.plan import Plan, read_plan
from btm_cluster.session import opened_driver
from btm_cluster.terminal.tables import progress_console
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
    progress = progress_console()
    with opened_driver(plan, address, in_process, progress, dashboard, new_resources) as driver:
        check_run(plan, driver)
        result = run_plan(plan, driver)
        finish_run(plan, driver, result)
        return result


def as_plan(source: Plan | str | Path | Mapping[str, Any]) -> Plan:
    """A plan, or what `read_plan` takes, as a plan.

    Raises:
        PlanError: naming every field that is wrong.
    """
    return source if isinstance(source, Plan) else read_plan(source)
