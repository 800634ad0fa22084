"""`btm init`."""

from pathlib import Path
from typing import Annotated

import typer


def init(path: Annotated[Path, typer.Argument(help="Where to write the plan.")] = Path("plan.yaml")) -> None:
    """Write a commented starter plan."""
    from btm_cluster.operations.init import write_starter_plan

    write_starter_plan(path)
    print(f"wrote {path}; next: edit its texts, then `btm plan {path}`")
