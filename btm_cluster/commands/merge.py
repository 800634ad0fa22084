"""`btm merge`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from btm_cluster.plan import read_plan
from btm_cluster.session import driving
from btm_cluster.terminal.options import Address, InProcess, JsonAndProgress, PlanPath
from btm_cluster.workers.shadowing import check_shadowing


def merge(
    plan_path: PlanPath,
    to: Annotated[Path, typer.Option(help="Folder for the Hugging Face model.", show_default=False)],
    weights: Annotated[
        str, typer.Option(help="uniform, argmax, posterior; or searched: greedy, learned.")
    ] = "posterior",
    target: Annotated[
        str | None, typer.Option("--for", help="Text to merge for; uniform needs none.")
    ] = None,
    json_output: JsonAndProgress = False,
    address: Address = None,
    in_process: InProcess = False,
) -> None:
    """Average the experts into one model and write it as a Hugging Face folder."""
    plan = read_plan(plan_path)
    check_shadowing()
    from btm_cluster.operations.merge import check_merge_call, write_merged_model

    check_merge_call(plan, weights, target, to)
    with driving(plan, address, in_process, dashboard=False, json_output=json_output) as driver:
        parts = write_merged_model(plan, weights, target, to, driver)
    told = f"wrote {to}: {', '.join(f'{weight:.3g} {name}' for name, weight in parts.items())}"
    print(json.dumps({"folder": str(to), "weights": parts}, indent=1) if json_output else told)
