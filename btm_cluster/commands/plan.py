"""`btm plan`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from btm_cluster.driver.capacity import NEW_RESOURCES
from btm_cluster.plan import read_plan
from btm_cluster.session import open_ledger
from btm_cluster.terminal.options import Address, JsonAndProgress, PlanPath
from btm_cluster.terminal.output import end_input
from btm_cluster.terminal.tables import consoles, plain_table, show_table
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from rich.console import Console

    from btm_cluster.operations.plan import Preview


def plan(plan_path: PlanPath, json_output: JsonAndProgress = False, address: Address = None) -> None:
    """Say what a run would do, what is done already, and what the rest would cost. Starts nothing."""
    plan = read_plan(plan_path)
    check_shadowing()
    end_input()
    from btm_cluster.operations.plan import preview
    from btm_cluster.workers.machine import notes_on_this_machine

    seen = preview(plan, open_ledger(plan.store))
    notes = notes_on_this_machine(seen.demands) if address is None else []
    if json_output:
        print(json.dumps(seen.to_json() | {"notes": notes}, indent=1))
    else:
        preview_table(seen, notes, consoles(False)[0])


def preview_table(preview: "Preview", notes: Sequence[str], console: "Console") -> None:
    """Prints what a run would do, what that would cost, and what should be known of the machine."""
    unit = "GPU-hours" if preview.on_gpus else "hours"
    rows = [
        [
            step.name,
            step.state,
            f"{step.updates:,}" if step.updates else "–",
            f"{step.tokens:,}" if step.tokens else "–",
            f"{step.stored_bytes / 1e6:,.1f} MB" if step.stored_bytes else "–",
            f"{step.device_hours:,.3f}" if step.device_hours is not None else "–",
        ]
        for step in preview.steps
    ]
    show_table(
        plain_table("What a run would do", ["step", "state", "updates", "tokens", "stored", unit], rows),
        console,
    )
    total = "no rate known: give cluster.tokens_per_gpu_second, or train something in this store first"
    if preview.device_hours is not None:
        total = f"{preview.device_hours:,.3f} {unit} of training to come"
    if preview.money is not None:
        total += f", {preview.money:,.2f} at {preview.price_per_gpu_hour} per GPU-hour"
    console.print(
        f"{preview.parameters:,} parameters, {preview.non_embedding_parameters:,} without embeddings; "
        f"{total}.",
        soft_wrap=True,
    )
    console.print(f"Every block is read after the token {preview.first_token}.", soft_wrap=True)
    goes_on = [
        f"{demand.label} goes on at update {demand.saved_at} with the resources of its start, "
        f"{demand.description}; "
        f"with the plan's by {NEW_RESOURCES}"
        for demand in preview.demands
        if demand.saved_at is not None
    ]
    for note in (*preview.notes, *goes_on, *notes):
        console.print(f"note: {note}", soft_wrap=True)
