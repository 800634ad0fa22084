"""`btm report`."""

from pathlib import Path
from typing import Annotated

import typer

from btm_cluster.errors import UserError
from btm_cluster.plan import read_plan
from btm_cluster.plan.file import is_plan_file
from btm_cluster.session import open_ledger


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A plan, and folders of studies whose curves to show; or such folders alone.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option(help="Folder for the page.", show_default=False)],
) -> None:
    """Write the HTML page of a plan from its store, or of studies from their result folders.

    Trains and scores nothing, and starts nothing."""
    from btm_cluster.operations.report import write_plan_report, write_report

    plans = [source for source in sources if is_plan_file(source)]
    if not plans:
        print(f"wrote {write_report(sources, to)}")
        return
    if len(plans) > 1:
        raise UserError(
            "a page is of one plan", found=", ".join(map(str, plans)), remedy="call `btm report` for each"
        )
    plan = read_plan(plans[0])
    studies = [source for source in sources if source not in plans]
    print(f"wrote {write_plan_report(plan, studies, to, open_ledger(plan.store))}")
