"""Numbers with their intervals, below each other on one scale: how systems differ from a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass

from btm_cluster.report.drawing import Drawing, Scale, percent, shorten, ticks

WIDTH, ROW, TOP, EDGE = 328, 36, 22, 10
MOST_CHARACTERS = 40


@dataclass(frozen=True)
class Measured:
    """A relative difference with its interval."""

    name: str
    value: float
    low: float
    high: float


def draw_intervals(title: str, rows: Sequence[Measured], zero: str) -> str:
    """A dot and a bar for each row, under its name. `zero` names what is at zero.

    What lies left of zero is better. The scale ends where the rows that are much worse than all others would
    press these together; an arrow at its end then stands for their dots.
    """
    low = min([0.0, *(row.low for row in rows)])
    high = max([0.0, *(row.high for row in rows)])
    high = min(high, max(0.02, -low, sorted(row.high for row in rows)[len(rows) // 2]))
    scale = Scale(low, high, EDGE, WIDTH - EDGE)
    told = "; ".join(f"{row.name} {percent(row.value)}" for row in rows)
    drawing = Drawing(
        WIDTH, TOP + ROW * len(rows) + 8, title, f"Against {zero}: {told}. Left of 0 is better."
    )
    bottom = TOP + ROW * len(rows)
    for tick in ticks(low, high, 4):
        drawing.line((scale(tick), TOP - 4), (scale(tick), bottom), "zero" if tick == 0 else "grid")
        drawing.text(_inside(scale(tick)), TOP - 8, percent(tick), "small", "middle")
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        css = "better" if row.high < 0 else "worse" if row.low > 0 else "same"
        drawing.text(EDGE, y + 13, shorten(row.name, MOST_CHARACTERS))
        drawing.text(WIDTH - EDGE, y + 13, f"{100 * row.value:+.1f} %".replace("-", "−"), "value", "end")
        ends = [min(max(end, low), high) for end in (row.low, row.high)]
        drawing.line((scale(ends[0]), y + 24), (scale(ends[1]), y + 24), f"interval {css}")
        if row.value > high:
            tip = WIDTH - EDGE + 5
            drawing.add("path", d=f"M{tip - 9} {y + 18}L{tip} {y + 24}L{tip - 9} {y + 30}z", css=css)
        else:
            drawing.dot(scale(row.value), y + 24, 5, css)
    return drawing.svg()


def _inside(x: float) -> float:
    return min(max(x, 18.0), WIDTH - 18.0)
