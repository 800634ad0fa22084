"""`btm study`."""

from typing import Annotated

import typer

from btm_cluster.plan import read_plan
from btm_cluster.session import driving, opened_view
from btm_cluster.terminal.options import Address, Dashboard, InProcess, NewResources, PlanPath
from btm_cluster.workers.shadowing import check_shadowing


def study(
    plan_path: PlanPath,
    to: Annotated[
        str, typer.Option(help="Folder for the results, or s3://bucket/prefix.", show_default=False)
    ],
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
    new_resources: NewResources = False,
) -> None:
    """Run the paper's comparison on the plan's texts: rivals, controls, sizes, repeats; tables and figures."""
    plan = read_plan(plan_path)
    check_shadowing()
    with opened_view() as view:
        from btm_cluster.operations.study import open_place, write_studies

        place = open_place(to)
        with driving(view, plan, address, in_process, dashboard, new_resources, command="study") as driver:
            for page in write_studies(plan, place, driver):
                print(f"wrote {page}", flush=True)
