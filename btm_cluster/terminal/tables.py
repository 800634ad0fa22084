"""Tables at a terminal, and the consoles that results and progress go to.

Knows rich, and nothing that is shown.

Every command imports this module. rich takes long to import, so that it is only where something is shown.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_COLUMNS = 100_000
"""Wider than any table."""


def plain_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    """A table of strings; the first column to the left, the others to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def consoles(json_output: bool) -> "tuple[Console, Console]":
    """Where results go and where progress goes: with --json, standard output is for the JSON alone.

    What is printed is shown as it is: names may have square brackets or colons, which rich would take for its
    markup.
    """
    from rich.console import Console

    as_it_is: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    results = Console(width=None if sys.stdout.isatty() else 200, **as_it_is)
    return results, Console(stderr=json_output, width=None if sys.stderr.isatty() else 200, **as_it_is)


def show_table(table: "Table", console: "Console") -> None:
    """Prints a table, wider than the terminal where it must be: no name and no number is cut."""
    from rich.cells import cell_len

    for column in table.columns:  # rich would take from the widest, which may have one long word alone
        cells = map(str, (column.header, *column.cells))
        parts = cells if column.no_wrap else (word for cell in cells for word in cell.split())
        column.min_width = max(map(cell_len, parts), default=0)
    least = table.__rich_measure__(console, console.options.update(width=MOST_COLUMNS)).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)
