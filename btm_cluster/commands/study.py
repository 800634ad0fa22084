"""`btm study`."""

import json
from typing import Annotated

import typer

from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.options import (
    Address,
    Dashboard,
    InProcess,
    JsonAndProgress,
    NewResources,
    PlanPath,
)
from btm_cluster.workers.shadowing import check_shadowing


def study(
    plan_path: PlanPath,
    to: Annotated[
        str, typer.Option(help="Folder for the results, or s3://bucket/prefix.", show_default=False)
    ],
    json_output: JsonAndProgress = False,
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
) -> None:
    """Run the paper's comparison on the plan's texts: baselines, controls, sizes, repeats."""
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.operations.study import open_place, write_studies

        place = open_place(to)
        with driving(view, plan, address, in_process, dashboard, new_resources, command="study") as driver:
            written = None
            for written in write_studies(plan, place, driver):
                if not json_output:
                    print(f"wrote {written.page}", flush=True)
        if json_output and written is not None:
            print(json.dumps(written.to_json(), indent=2), flush=True)
