"""`btm doctor`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from btm_cluster.errors import UserError
from btm_cluster.plan import read_plan
from btm_cluster.terminal.options import Address, JsonAndProgress
from btm_cluster.terminal.output import end_input
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.workers.checks import Check


def doctor(
    plan_path: Annotated[
        Path | None, typer.Argument(help="The plan, a YAML file.", show_default=False)
    ] = None,
    json_output: JsonAndProgress = False,
    address: Address = None,
) -> None:
    """Look for what would make a run fail: Ray, token, store, clock, disk, GPUs, threads, capacity. Trains nothing."""
    plan = None if plan_path is None else read_plan(plan_path)
    check_shadowing()
    end_input()
    from btm_cluster.operations.doctor import examine

    checks = examine(plan, address, Path.cwd())
    wrong = sum(check.state == "wrong" for check in checks)
    print(
        json.dumps([asdict(check) for check in checks], indent=1)
        if json_output
        else "\n".join(check_lines(checks))
    )
    if wrong:
        raise UserError(
            f"{wrong} of {len(checks)} checks found something wrong", remedy="the lines above say what to do"
        )


def check_lines(checks: Sequence["Check"]) -> list[str]:
    """A line for each check of `btm doctor`, with the remedy where one is called for."""
    width = max(len(check.name) for check in checks)
    return [
        f"{check.state:5}  {check.name:{width}}  "
        f"{check.found}{'; remedy: ' if check.remedy else ''}{check.remedy}"
        for check in checks
    ]
