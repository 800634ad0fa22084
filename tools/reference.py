"""Writes the pages of docs/reference/ that the code itself says: `python tools/reference.py`.

A test compares the pages with what this would write.
"""

import html
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from btm_cluster.cli import app
from btm_cluster.operations.schema import plan_reference

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"


def command_reference() -> str:
    """Every command with its arguments and options, by typer's own generator."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="btm")
    pages = get_docs_for_click(obj=command, ctx=context, name="btm", title="Commands")
    note = "Written by `make reference` from the commands themselves; do not edit."
    return html.unescape(pages).replace("# Commands\n", f"# Commands\n\n{note}\n", 1)


PAGES = {"plan.md": plan_reference, "commands.md": command_reference}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
