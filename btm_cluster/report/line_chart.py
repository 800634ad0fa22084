"""Curves over one axis."""

from collections.abc import Sequence
from dataclasses import dataclass

from btm_cluster.report.drawing import Drawing, Scale, compact, shorten, tick_words, ticks

WIDTH, HEIGHT = 330, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
MOST_POINTS, LEAST_POINTS, ALL_POINTS = 100, 40, 3_000
"""Of a curve, and of all in a chart: many curves have fewer each."""
MOST_DOTS = 12
"""Points of a curve that are marked each."""


@dataclass(frozen=True)
class Line:
    """A curve, and the number of its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False


def draw_lines(
    title: str,
    lines: Sequence[Line],
    axes: tuple[str, str],
    level: tuple[str, float] | None = None,
    most: float | None = None,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Curves; `axes` name both axes, `level` is a horizontal line with its name.

    What lies above `most` leaves the drawing.
    """
    points = [point for line in lines for point in line.points]
    values = [value for _, value in points] + ([level[1]] if level else [])
    low, high = min(values), min(max(values), most if most is not None else max(values))
    margin = 0.05 * (high - low) or 0.05 * (abs(high) or 1)
    across = Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, width - RIGHT)
    up = Scale(low - margin, high + margin, height - BOTTOM, TOP)
    told = "; ".join(f"{one.name} ends at {one.points[-1][1]:.4g}" for one in lines[:20] if one.points)
    drawing = Drawing(width, height, title, f"{axes[1]} over {axes[0]}. {told}.")
    _draw_axes(drawing, across, up, axes)
    if level:
        drawing.line((LEFT, up(level[1])), (across.end, up(level[1])), "level")
        drawing.text(across.end, up(level[1]) - 4, shorten(level[0], 40), "small", "end")
    most_points = max(LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // len(lines)))
    for line in lines:
        _draw_line(drawing, line, across, up, most_points)
    return drawing.svg()


def _draw_axes(drawing: Drawing, across: Scale, up: Scale, axes: tuple[str, str]) -> None:
    bottom = up.start
    marks = ticks(up.low, up.high)
    for tick, words in zip(marks, tick_words(marks), strict=True):
        drawing.line((LEFT, up(tick)), (across.end, up(tick)), "grid")
        drawing.text(LEFT - 5, up(tick) + 4, words, "small", "end")
    for tick in ticks(across.low, across.high):
        drawing.line((across(tick), bottom), (across(tick), bottom + 4), "axis")
        drawing.text(across(tick), bottom + 16, compact(tick), "small", "middle")
    drawing.line((LEFT, bottom), (across.end, bottom), "axis")
    drawing.text(across.end, bottom + BOTTOM - 6, axes[0], "small", "end")
    drawing.text(4, 14, axes[1])


def _draw_line(drawing: Drawing, line: Line, across: Scale, up: Scale, most: int) -> None:
    kept = [(across(x), max(up(value), TOP)) for x, value in thinned(line.points, most)]
    css = f"line c{line.colour}" + (" dashed" if line.is_dashed else "")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
    drawing.add("polyline", points=path, css=css)
    if len(kept) <= MOST_DOTS:
        for x, y in kept:
            drawing.dot(x, y, 3, f"c{line.colour}")


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Evenly spaced ones of many points, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]
