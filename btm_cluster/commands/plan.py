"""`btm plan`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btm_cluster.driver.capacity import NEW_RESOURCES
from btm_cluster.plan import read_plan
from btm_cluster.session import open_ledger
from btm_cluster.terminal.amounts import duration
from btm_cluster.terminal.options import Address, JsonAndProgress, PlanPath
from btm_cluster.terminal.output import end_input
from btm_cluster.terminal.tables import consoles, fitting, plain_table, say, show_table
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from btm_cluster.driver.text_sizes import TextSize, TextUse
    from btm_cluster.operations.plan import Preview


def plan(plan_path: PlanPath, json_output: JsonAndProgress = False, address: Address = None) -> None:
    """Say what a run would do, what is done already, and what the rest would cost. Starts nothing."""
    show_preview(plan_path, json_output, address, new_resources=False)


def show_preview(plan_path: Path, json_output: bool, address: str | None, new_resources: bool) -> None:
    """Previews a run, with the plan's resources for trainings that go on where that is asked for."""
    plan = read_plan(plan_path)
    check_shadowing()
    end_input()
    from btm_cluster.driver.room import SOME_CLUSTER
    from btm_cluster.operations.plan import preview
    from btm_cluster.workers.machine import notes_on_this_machine, room_here

    room = room_here(plan.cluster.gpus_per_expert > 0) if address is None else SOME_CLUSTER
    seen = preview(plan, open_ledger(plan.store), new_resources, room)
    notes = notes_on_this_machine(seen.demands) if address is None else []
    if json_output:
        print(json.dumps(seen.to_json() | {"notes": [*seen.notes, *notes]}, indent=1))
    else:
        preview_table(seen, notes, consoles(False)[0])


def preview_table(preview: "Preview", notes: Sequence[str], console: "Console") -> None:
    """Prints what a run would do, what that would cost, and what should be known of the machine."""
    show_table(fitting(_steps_tables(preview), console), console)
    show_table(_texts_table(preview.texts), console)
    parameters = f"{preview.parameters:,} parameters, {preview.non_embedding_parameters:,} without embeddings"
    say(f"{parameters}; {_cost_line(preview)}.", console)
    models, checkpoints = preview.bytes_to_store / 1e9, preview.checkpoint_bytes / 1e9
    if models:
        say(
            f"To be stored: {models:,.2f} GB of models; and while they train, up to {checkpoints:,.2f} GB of "
            "training checkpoints.",
            console,
        )
    for line in preview.memory_lines:
        say(line, console)
    say(f"Every block is read after the token {preview.first_token}.", console)
    goes_on = [
        f"{demand.label} goes on at update {demand.saved_at} with the resources of its start, "
        f"{demand.description}; with the plan's by {NEW_RESOURCES}"
        for demand in preview.demands
        if demand.saved_at is not None
    ]
    for note in (*preview.notes, *goes_on, *notes):
        say(f"note: {note}", console)


def _steps_tables(preview: "Preview") -> "list[Table]":
    """The same table narrower and narrower: without tokens, bytes and updates; then with names broken."""
    about = "≈" if preview.rate.is_estimate else ""
    hours = "GPU-hours" if preview.on_gpus else "CPU-hours"
    columns = {
        "step": [step.name for step in preview.steps],
        "state": [step.state for step in preview.steps],
        "updates": [f"{step.updates:,}" if step.updates else "–" for step in preview.steps],
        "tokens": [f"{step.tokens:,}" if step.tokens else "–" for step in preview.steps],
        "stored": [
            f"{step.stored_bytes / 1e6:,.1f} MB" if step.stored_bytes else "–" for step in preview.steps
        ],
        hours: [f"{about}{step.device_hours:,.3f}" if step.device_hours else "–" for step in preview.steps],
    }
    tables = []
    without = [(), ("tokens",), ("tokens", "stored"), ("tokens", "stored", "updates")]
    for left_out in (*without, without[-1]):
        kept = {heading: cells for heading, cells in columns.items() if heading not in left_out}
        rows = list(zip(*kept.values(), strict=True))
        tables.append(plain_table("What a run would do", list(kept), rows))
        tables[-1].columns[0].no_wrap = True
    tables[-1].columns[0].no_wrap = False
    return tables


def _texts_table(texts: "Sequence[TextUse]") -> "Table":
    """Passes over each training text."""
    from btm_cluster.driver.text_sizes import shown_passes

    def shown(passes: float | None, size: "TextSize") -> str:
        return "not known yet" if passes is None else shown_passes(passes, size)

    rows = [
        [
            use.size.name,
            _tokens(use.size),
            *(shown(passes, use.size) for passes in (use.seed_passes, use.expert_passes, use.passes)),
        ]
        for use in texts
    ]
    headings = ["text", "training tokens", "by the seed", "by its expert", "together"]
    table = plain_table("Passes over each training text", headings, rows)
    table.columns[0].no_wrap = True
    return table


def _tokens(size: "TextSize") -> str:
    """The number of tokens of a text, or three digits of an estimate."""
    if size.train is None:
        return "not known yet"
    return f"≈{int(float(f'{size.train:.2e}')):,}" if size.is_estimate else f"{size.train:,}"


def _cost_line(preview: "Preview") -> str:
    """The cost of what is still to be done, and how it is known."""
    if preview.is_done:
        return "everything is done: a run shows the verdict from the store"
    spent = [f"{preview.gpu_hours:,.3f} GPU-hours"] if preview.on_gpus else []
    if preview.cpu_hours or not preview.on_gpus:
        spent.append(f"{preview.cpu_hours:,.3f} CPU-hours")
    about = "≈" if preview.rate.is_estimate else ""
    told = f"{about}{' and '.join(spent)} of training and scoring to come"
    if preview.money is not None:
        told += f", {preview.money:,.2f} at {preview.price_per_gpu_hour} per GPU-hour"
    return f"{told}, about {duration(max(60.0, 3600 * preview.wall_hours))} {preview.room} ({preview.rate.origin})"
