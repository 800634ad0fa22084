"""Progress at a terminal: the whole run on top, what is done as counts, and a bar for each step under way."""

from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from btm_cluster.driver.outlook import Count
from btm_cluster.requests.progress import Progress
from btm_cluster.terminal.amounts import amount, checkpoint, duration, loss, rate, seconds_left, time_left

NARROW, WIDE, WIDEST = 60, 100, 140
"""Columns from which on rows have a bar, a rate and an estimate, and what checkpoints cost."""
LINES_LEFT_FREE = 2
BETWEEN = " · "


@dataclass(frozen=True)
class Screen:
    """What is shown at one moment."""

    doing: str
    """What is done that is no step."""
    counts: tuple[Count, ...]
    running: tuple[Progress, ...]
    elapsed_seconds: float
    seconds_left: float | None
    share: float
    """Of the run that is done, from 0 to 1, where it is known how long the rest takes."""

    def __rich_console__(self, console: Console, _: object) -> list[RenderableType]:
        above = [_headline(self, console.width), *_counts(self.counts, console.width)]
        if self.doing and not self.running:
            above.append(Text(f"{self.doing}…"))
        used = sum(len(console.render_lines(one)) for one in above)
        return [Group(*above, *_rows(self.running, console, console.height - used - LINES_LEFT_FREE))]


def _headline(screen: Screen, width: int) -> RenderableType:
    elapsed = duration(screen.elapsed_seconds)
    if screen.seconds_left is None:
        return Text(f"{elapsed} so far", style="bold")
    words = Text(f"{screen.share:4.0%}  {elapsed} so far, {time_left(screen.seconds_left)}", style="bold")
    if width < NARROW:
        return words
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=1.0, completed=screen.share, width=width // 4), words)
    return grid


def _counts(counts: tuple[Count, ...], width: int) -> list[RenderableType]:
    """Every kind of step that was asked for, as a count; lines break between kinds."""
    lines: list[Text] = []
    for count in counts:
        if not count.is_asked:
            continue
        words = Text(
            f"{count.done}/{count.total} {count.kind.done}", "dim" if count.done == count.total else ""
        )
        if count.failed:
            words.append(f" ({count.failed} failed)", "red")
        if lines and lines[-1].cell_len + len(BETWEEN) + words.cell_len <= width:
            lines[-1].append(BETWEEN).append_text(words)
        else:
            lines.append(words)
    return list(lines)


def _rows(running: tuple[Progress, ...], console: Console, room: int) -> list[RenderableType]:
    """A row for each job, as many as there is room for."""
    if not running:
        return []
    shown = running if len(running) <= room else running[: max(1, room - 1)]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=max(16, console.width // 3))
    for progress in shown:
        table.add_row(f"{progress.phase} {progress.label}", *_cells(progress, console.width))
    for column in table.columns[1:]:
        column.no_wrap = True
    rest = len(running) - len(shown)
    return [table, *([Text(f"and {rest} more", "dim")] if rest else [])]


def _cells(progress: Progress, width: int) -> list[RenderableType]:
    share = progress.share
    counted = progress.note or amount(progress)
    if width < NARROW:
        return [counted if share is None else f"{share:4.0%}"]
    bar: RenderableType = ""
    if share is not None:
        bar = ProgressBar(total=1.0, completed=share, width=width // 8)
    if width < WIDE:
        return [bar, counted, loss(progress) or rate(progress)]
    left = seconds_left(progress)
    cells = [bar, counted, loss(progress), rate(progress), "" if left is None else time_left(left)]
    return [*cells, checkpoint(progress)] if width >= WIDEST else cells
