"""Curves over one axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from btm_cluster.report.drawing import Drawing, Scale, compact, shorten, tick_labels, ticks

WIDTH, HEIGHT = 330, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
MOST_POINTS, LEAST_POINTS, ALL_POINTS = 100, 40, 3_000
"""Most points of a curve, and of all curves of a chart: many curves have fewer each."""
MOST_DOTS = 12
"""Points of a curve that are marked each."""


LEGEND = 20
"""Pixels of a row of the legend, of two names."""
Points: TypeAlias = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve, and the number of its colour."""

    name: str
    points: Points
    colour: int
    is_dashed: bool = False


def draw_lines(
    title: str,
    lines: Sequence[Line],
    axes: tuple[str, str],
    level: tuple[str, float] | None = None,
    most: float = math.inf,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    has_legend: bool = False,
) -> str:
    """Curves; `axes` name both axes, `level` is a horizontal line with its name.

    What lies above `most` is outside of the drawing.
    """
    points = [point for line in lines for point in line.points]
    values = [value for _, value in points] + ([level[1]] if level else [])
    high = min(most, max(values))
    low = min([value for value in values if value <= high], default=high)
    margin = 0.05 * (high - low) or 0.05 * (abs(high) or 1)
    width, height = size
    across = Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, width - RIGHT)
    up = Scale(low - margin, high + margin, height - BOTTOM, TOP)
    told = "; ".join(f"{one.name} ends at {one.points[-1][1]:.4g}" for one in lines[:20] if one.points)
    foot = LEGEND * -(-len(lines) // 2) if has_legend else 0
    drawing = Drawing(width, height + foot, title, f"{axes[1]} over {axes[0]}. {told}.")
    _draw_axes(drawing, across, up, axes)
    if level:
        drawing.line((LEFT, up(level[1])), (across.end, up(level[1])), "level")
        drawing.text(LEFT + 4, up(level[1]) - 4, shorten(level[0], 40), "small")
    most_points = max(LEAST_POINTS, min(MOST_POINTS, ALL_POINTS // len(lines)))
    for number, line in enumerate(lines):
        _draw_line(drawing, line, across, up, most_points)
        if has_legend:
            place = (LEFT + number % 2 * (width - LEFT) / 2, height + LEGEND * (number // 2))
            drawing.rectangle(place[0], place[1], 12, 12, f"c{line.colour}")
            drawing.text(place[0] + 18, place[1] + 11, line.name)
    return drawing.svg()


def _draw_axes(drawing: Drawing, across: Scale, up: Scale, axes: tuple[str, str]) -> None:
    bottom = up.start
    marks = ticks(up.low, up.high)
    for tick, label in zip(marks, tick_labels(marks), strict=True):
        drawing.line((LEFT, up(tick)), (across.end, up(tick)), "grid")
        drawing.text(LEFT - 5, up(tick) + 4, label, "small", "end")
    for tick in ticks(across.low, across.high):
        drawing.line((across(tick), bottom), (across(tick), bottom + 4), "axis")
        drawing.text(across(tick), bottom + 16, compact(tick), "small", "middle")
    drawing.line((LEFT, bottom), (across.end, bottom), "axis")
    drawing.text(across.end, bottom + BOTTOM - 6, axes[0], "small", "end")
    drawing.text(4, 14, axes[1])


def _draw_line(drawing: Drawing, line: Line, across: Scale, up: Scale, most: int) -> None:
    css = f"line c{line.colour}" + (" dashed" if line.is_dashed else "")
    kept = thinned(line.points, most)
    for stretch in below(kept, up.high):
        path = " ".join(f"{across(x):.1f},{up(value):.1f}" for x, value in stretch)
        drawing.add("polyline", points=path, css=css)
    if len(kept) <= MOST_DOTS:
        for x, value in kept:
            if value <= up.high:
                drawing.dot(across(x), up(value), 3, f"c{line.colour}")


def below(points: Points, most: float) -> list[list[tuple[float, float]]]:
    """The stretches of a line that are not above `most`, cut where it crosses that."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for number, (x, value) in enumerate(points):
        before = points[number - 1] if number else (x, value)
        if (before[1] > most) != (value > most):
            share = (most - before[1]) / (value - before[1])
            stretches[-1].append((before[0] + share * (x - before[0]), most))
        if value <= most:
            stretches[-1].append((x, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def thinned(points: Points, most: int) -> list[tuple[float, float]]:
    """Evenly spaced ones of many points, first and last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(number * (len(points) - 1) / (most - 1))] for number in range(most)]
