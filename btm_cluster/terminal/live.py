"""Progress at a terminal: the whole run on top, what is done as counts, and a bar for each step under way."""

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from btm_cluster.driver.outlook import Count
from btm_cluster.requests.progress import Progress
from btm_cluster.terminal.amounts import amount, checkpoint, duration, loss, rate, seconds_left, time_left

NARROW = 60
"""Columns from which on there are bars."""
GAP = 2
"""Columns between two of a row."""
LINES_LEFT_FREE = 2
BETWEEN = " · "


@dataclass(frozen=True)
class Screen:
    """The display at one moment."""

    doing: str
    """The activity, where that is no step."""
    part: str
    """The part of the whole that is under way, where there are several."""
    counts: tuple[Count, ...]
    running: tuple[Progress, ...]
    elapsed_seconds: float
    seconds_left: float | None
    share: float
    """Finished share of the run, from 0 to 1, where the time left is known."""
    table: str = ""
    """The state of trials that compete."""

    def __rich_console__(self, console: Console, _: object) -> list[RenderableType]:
        above = [_headline(self, console.width), *_counts(self.counts, console.width)]
        if self.table:
            above.append(Text(self.table, no_wrap=True, overflow="ellipsis"))
        if not self.running:
            is_open = any(count.is_asked and count.done + count.failed < count.total for count in self.counts)
            doing = "waiting for the next steps to start" if is_open else self.doing
            above.append(Text(f"{doing}…" if doing else ""))
        used = sum(len(console.render_lines(one)) for one in above)
        return [Group(*above, *_rows(self.running, console, console.height - used - LINES_LEFT_FREE))]


def _headline(screen: Screen, width: int) -> RenderableType:
    elapsed = duration(screen.elapsed_seconds)
    if screen.seconds_left is None:
        return Text(f"{elapsed} so far" + (f", {screen.part}" if screen.part else ""), style="bold")
    label = Text(f"{screen.share:4.0%}  {elapsed} so far, {time_left(screen.seconds_left)}", style="bold")
    if width < NARROW:
        return label
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=1.0, completed=screen.share, width=width // 4), label)
    return grid


def _counts(counts: tuple[Count, ...], width: int) -> list[RenderableType]:
    """Every kind of step that was asked for, as a count; lines break between kinds."""
    lines: list[Text] = []
    for count in counts:
        if not count.is_asked:
            continue
        label = Text(
            f"{count.done}/{count.total} {count.kind.done}", "dim" if count.done == count.total else ""
        )
        if count.failed:
            label.append(f" ({count.failed} failed)", "red")
        if lines and lines[-1].cell_len + len(BETWEEN) + label.cell_len <= width:
            lines[-1].append(BETWEEN).append_text(label)
        else:
            lines.append(label)
    return list(lines)


def _rows(running: tuple[Progress, ...], console: Console, room: int) -> list[RenderableType]:
    """A row for each job, as many as there is room for; the columns that do not fit are left out."""
    if not running:
        return []
    shown = running if len(running) <= room else running[: max(1, room - 1)]
    names = [f"{progress.phase} {progress.label}" for progress in shown]
    cells = [_cells(progress, console.width) for progress in shown]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    bar = console.width // 8 if console.width >= NARROW and any(one.share is not None for one in shown) else 0
    wanted = min(max(map(cell_len, names)), console.width * 2 // 5)
    while widths and sum(width + GAP for width in [wanted, bar, *widths] if width) > console.width + GAP:
        widths.pop()
    others = sum(width + GAP for width in [bar, *widths] if width)
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(1, console.width - others))
    for name, progress, row in zip(names, shown, cells, strict=True):
        drawn = [_bar(progress, bar)] if bar else []
        table.add_row(name, *drawn, *(cell for cell, width in zip(row, widths, strict=False) if width))
    rest = len(running) - len(shown)
    return [table, *([Text(f"and {rest} more", "dim")] if rest else [])]


def _bar(progress: Progress, width: int) -> RenderableType:
    share = progress.share
    return "" if share is None else ProgressBar(total=1.0, completed=share, width=width)


def _cells(progress: Progress, width: int) -> list[str]:
    """Texts of the columns after name and bar, the most important first."""
    share, left = progress.share, seconds_left(progress)
    if width < NARROW:
        return [progress.note if share is None else f"{share:4.0%}"]
    how_well, how_fast = loss(progress), rate(progress)
    return [
        progress.note or amount(progress),
        how_well or how_fast,
        how_fast if how_well else "",
        "" if left is None else time_left(left),
        checkpoint(progress),
    ]
