"""`btm report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    summaries: Annotated[
        list[Path], typer.Argument(help="Folders that `btm study` wrote.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="Folder for the page and its figures.", show_default=False)],
) -> None:
    """Make one page of tables and figures from the results of one or several
    studies, which are kept beside it."""
    from btm_cluster.operations.report import write_report

    print(f"wrote {write_report(summaries, to)}")
