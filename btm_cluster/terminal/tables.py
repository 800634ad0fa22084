"""Tables at a terminal, and the consoles that results and progress go to.

Knows rich, and nothing that is shown.

Every command imports this module. rich takes long to import, so that it is only where something is shown.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from btm_cluster.terminal.logs import is_quiet
from btm_cluster.terminal.output import Output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MOST_COLUMNS = 100_000
"""Wider than any table."""
_AS_IT_IS: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "force_jupyter": False}
"""What is printed is shown as it is: names may have square brackets or colons, which rich
would take for its markup."""


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
    """Where results go and where notes beside them go: with --json, standard output is for the JSON alone."""
    from rich.console import Console

    results = Console(width=None if sys.stdout.isatty() else 200, **_AS_IT_IS)
    width = None if sys.stderr.isatty() else 200
    return results, Console(stderr=json_output, width=width, quiet=is_quiet(), **_AS_IT_IS)


def progress_console() -> "Console":
    """Where progress goes: standard error.

    Lines are replaced there only if that is the process's own: in a notebook it is said to be a terminal, and
    is none.
    """
    from rich.console import Console

    is_own = sys.stderr is sys.__stderr__ or isinstance(sys.stderr, Output)
    return Console(stderr=True, force_terminal=None if is_own else False, **_AS_IT_IS)


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
