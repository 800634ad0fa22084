"""A run over time: a lane for each process, and below it how many devices were busy."""

from collections.abc import Iterator, Sequence

from btm_cluster.report.drawing import Drawing, Scale, duration, share_text, shorten, time_ticks, width_of
from btm_cluster.report.timeline import Bar, Busy, Lane

WIDTH, LANE, FOOT, BUSY = 900, 20, 30, 70
MOST_CHARACTERS = 26
CLOSE = 0.7
"""Pixels below which two bars of one kind are drawn as one."""


def draw_gantt(title: str, lanes: Sequence[Lane], busy: Busy, seconds: float) -> str:
    """Bars of steps, thin marks for checkpoints and crosses for failures, over seconds since the run began."""
    names = [shorten(lane.name, MOST_CHARACTERS) for lane in lanes]
    left = max(width_of(names), width_of(["GPUs busy"])) + 10
    across = Scale(0.0, seconds, left, WIDTH - 16)
    height = LANE * len(lanes) + 14 + BUSY + FOOT
    told = f"{len(lanes)} processes over {duration(seconds)}; {busy.device} without a step {share_text(busy.idle)} of the time."
    drawing = Drawing(WIDTH, height, title, told)
    for tick, label in time_ticks(seconds, 8):
        drawing.line((across(tick), 0), (across(tick), height - FOOT), "grid")
        drawing.text(across(tick), height - FOOT + 16, label, "small", "middle")
    for number, (lane, name) in enumerate(zip(lanes, names, strict=True)):
        y = LANE * number
        drawing.text(left - 6, y + 14, name, "small", "end")
        for bar in merged(lane.bars, seconds / (WIDTH - left) * CLOSE):
            width = max(across(bar.end) - across(bar.start), 0.8)
            drawing.rectangle(across(bar.start), y + 3, width, LANE - 6, f"c{bar.colour}", bar.tip)
        for mark in merged(lane.marks, seconds / (WIDTH - left) * CLOSE):
            width = max(across(mark.end) - across(mark.start), 2.5)
            drawing.rectangle(across(mark.start), y, width, LANE, f"mark c{mark.colour}", mark.tip)
    _draw_busy(drawing, busy, across, LANE * len(lanes) + 14, seconds)
    return drawing.svg()


def _draw_busy(drawing: Drawing, busy: Busy, across: Scale, top: float, seconds: float) -> None:
    up = Scale(0.0, max([busy.total, *(count for _, count in busy.steps)]) or 1.0, top + BUSY, top)
    path = [f"M{across(0):.1f} {up(0):.1f}"]
    pixel, last = -1.0, 0.0
    for second, count in busy.steps:
        x = across(min(second, seconds))
        if x - pixel >= CLOSE or count > last:
            path.append(f"H{x:.1f}V{up(count):.1f}")
            pixel, last = x, count
    path.append(f"V{up(0):.1f}H{across(seconds):.1f}Z")
    drawing.add("path", d="".join(path), css="area")
    drawing.line((across(0), up(busy.total)), (across(seconds), up(busy.total)), "level")
    drawing.line((across(0), up(0)), (across(seconds), up(0)), "axis")
    drawing.text(across(0) - 6, top + 14, f"{busy.total:g} {busy.device}", "small", "end")
    drawing.text(across(0) - 6, top + BUSY, f"{busy.device} busy", "small", "end")


def merged(bars: Sequence[Bar], close_seconds: float) -> Iterator[Bar]:
    """Bars of one kind that almost touch, as one: thousands of short steps stay a few rectangles."""
    held: list[Bar] = []
    for bar in bars:
        if held and (held[-1].what != bar.what or bar.start - held[-1].end > close_seconds):
            yield _one(held)
            held = []
        held.append(bar)
    if held:
        yield _one(held)


def _one(bars: Sequence[Bar]) -> Bar:
    first = bars[0]
    if len(bars) == 1:
        return first
    end = max(bar.end for bar in bars)
    tip = f"{len(bars)} × {first.what}, {duration(end - first.start)}"
    return Bar(first.what, first.colour, first.start, end, tip)
