"""Tables at a terminal, and the consoles that results and progress go to.

Knows rich, and nothing that is shown.

Every command imports this module. rich takes long to import, so that it is only where something is shown.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from btm_cluster.terminal.logs import is_quiet
from btm_cluster.terminal.output import Output, wrapped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

ManyColumns: TypeAlias = tuple[str, list[str], list[list[str]]]
"""A title, headings, and rows of cells."""
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
    """The consoles of results and of notes beside them: with --json, standard output is for the JSON alone."""
    from rich.console import Console

    results = Console(width=None if sys.stdout.isatty() else 200, **_AS_IT_IS)
    width = None if sys.stderr.isatty() else 200
    return results, Console(stderr=json_output, width=width, quiet=is_quiet(), **_AS_IT_IS)


def progress_console() -> "Console":
    """The console of progress: standard error.

    Lines are replaced there only if that is the process's own: in a notebook it is said to be a terminal, and
    is none.
    """
    from rich.console import Console

    is_own = sys.stderr is sys.__stderr__ or isinstance(sys.stderr, Output)
    return Console(stderr=True, force_terminal=None if is_own else False, **_AS_IT_IS)


def say(sentence: str, console: "Console") -> None:
    """Prints a sentence: at a terminal its lines break between words, elsewhere they do not break."""
    console.print(wrapped(sentence, console.width if console.is_terminal else None), soft_wrap=True)


def show_table(table: "Table", console: "Console") -> None:
    """Prints a table, wider than the terminal where it must be: no name and no number is cut."""
    least = _least_width(table, console)
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def fitting(tables: Sequence["Table"], console: "Console") -> "Table":
    """The first of several that is no wider than the terminal, or the last."""
    return next((table for table in tables if _least_width(table, console) <= console.width), tables[-1])


def show_stacked(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: "Console"
) -> None:
    """Prints a table that may have many columns as several, one below the other, as wide as the terminal.

    Each has the first column.
    """
    start = 1
    while start < len(headings) or start == 1:
        stop = len(headings)
        while True:
            kept = [0, *range(start, stop)]
            shown = [[row[i] for i in kept] for row in rows]
            table = plain_table(title if start == 1 else "", [headings[i] for i in kept], shown)
            table.columns[0].no_wrap = True
            if stop <= start + 1 or _least_width(table, console) <= console.width:
                break
            stop -= 1
        show_table(table, console)
        start = stop


def _least_width(table: "Table", console: "Console") -> int:
    """The width below which something would be cut, which no column is narrower than from now on."""
    from rich.cells import cell_len

    for column in table.columns:  # rich would take from the widest, which may have one long word alone
        cells = map(str, (column.header, *column.cells))
        parts = (part for cell in cells for part in (cell.splitlines() if column.no_wrap else cell.split()))
        column.min_width = max(map(cell_len, parts), default=0)
    return table.__rich_measure__(console, console.options.update(width=MOST_COLUMNS)).minimum
