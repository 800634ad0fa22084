"""Bars below each other: sizes of texts, and what each expert is worth."""

from collections.abc import Sequence

from btm_cluster.report.drawing import Drawing, Format, Scale, compact, shorten, width_of

WIDTH, ROW = 420, 22
MOST_CHARACTERS = 22


def draw_bars(title: str, rows: Sequence[tuple[str, float]], as_text: Format = compact) -> str:
    """A bar from zero for each name; those below zero go to the left."""
    names = [shorten(name, MOST_CHARACTERS) for name, _ in rows]
    left, values = width_of(names) + 8, [value for _, value in rows]
    scale = Scale(min(0.0, *values), max(0.0, *values), left + (40 if min(values) < 0 else 0), WIDTH - 62)
    told = "; ".join(f"{name} {as_text(value)}" for name, value in rows[:20])
    drawing = Drawing(WIDTH, ROW * len(rows) + 4, title, told + ".")
    for number, ((_, value), name) in enumerate(zip(rows, names, strict=True)):
        y = ROW * number
        start, end = sorted((scale(0), scale(value)))
        drawing.text(left - 6, y + 15, name, "", "end")
        drawing.rectangle(start, y + 4, max(end - start, 0.5), ROW - 8, "c0")
        is_left = value < 0
        drawing.text(
            start - 4 if is_left else end + 4, y + 15, as_text(value), "small", "end" if is_left else "start"
        )
    drawing.line((scale(0), 0), (scale(0), ROW * len(rows)), "axis")
    return drawing.svg()
