"""A matrix as shades: one path for each shade, so that thousands of cells stay small."""

from collections.abc import Sequence

from btm_cluster.report.drawing import Drawing, shorten, width_of

SHADES = 10
"""Shades beside none; shade s is the class `h<s>`."""
MOST_WITH_NUMBERS = 20
"""Rows and columns up to which cells have room for their numbers."""
MOST_CHARACTERS = 18


def draw_heat_map(
    title: str,
    description: str,
    rows: Sequence[str],
    columns: Sequence[str],
    shades: Sequence[Sequence[float | None]],
    labels: Sequence[Sequence[str]],
) -> str:
    """A cell for each row and column, darker from 0 to 1; None is left empty. `labels` are for small maps."""
    is_small = max(len(rows), len(columns)) <= MOST_WITH_NUMBERS
    wide, high = (52.0, 28.0) if is_small else (13.0, 13.0)
    names = [shorten(name, MOST_CHARACTERS) for name in rows]
    headings = [shorten(name, MOST_CHARACTERS) for name in columns]
    angle = -40 if is_small else -90
    left, top = width_of(names) + 10, (0.62 if is_small else 0.8) * width_of(headings) + 26
    right = 0.78 * width_of(headings[-3:]) if is_small else 8.0
    drawing = Drawing(left + wide * len(columns) + right, top + high * len(rows) + 4, title, description)
    cells: dict[int, list[str]] = {}
    for i, row in enumerate(shades):
        for j, shade in enumerate(row):
            if shade is not None:
                level = round(SHADES * min(max(shade, 0.0), 1.0))
                cells.setdefault(level, []).append(f"M{j} {i}h.95v.95h-.95z")
    for level, places in sorted(cells.items()):
        place = f"translate({left:g} {top:g}) scale({wide:g} {high:g})"
        drawing.add("path", d="".join(places), transform=place, css=f"h{level}")
    for i, name in enumerate(names):
        drawing.text(left - 6, top + (i + 0.5) * high + 4, name, "" if is_small else "tiny", "end")
    for j, heading in enumerate(headings):
        x, y = left + (j + 0.5) * wide + (0 if is_small else 3), top - 6
        drawing.text(x, y, heading, "" if is_small else "tiny").set(
            "transform", f"rotate({angle} {x:g} {y:g})"
        )
    if is_small:
        for i, numbers in enumerate(labels):
            for j, number in enumerate(numbers):
                drawing.text(left + (j + 0.5) * wide, top + (i + 0.5) * high + 4, number, "cell", "middle")
    return drawing.svg()
