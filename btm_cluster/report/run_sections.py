"""A run on a page: curves of its trainings, its timeline, and what it cost."""

from collections.abc import Callable, Mapping, Sequence

from btm_cluster.curve import Curve
from btm_cluster.ledger.timelines import Timeline
from btm_cluster.report.content import Block, Figure, Figures, Key, Paragraph, Section, Table, not_measured
from btm_cluster.report.drawing import duration, share_text
from btm_cluster.report.expert_sections import OTHERS
from btm_cluster.report.gantt import draw_gantt
from btm_cluster.report.line_chart import Line, Points, draw_lines
from btm_cluster.report.measured import Training
from btm_cluster.report.timeline import busy_of, lanes_of, mishaps, seconds_of, totals, what_of

CURVES = ("curves", "Training")
TIMELINE = ("timeline", "Timeline and cost")
SEED_COLOUR, BASELINE_COLOUR = 5, 6
RUNS_SHOWN = 20
MISHAPS_SHOWN = 50
_PLOTS: Mapping[str, tuple[str, Callable[[Curve], Points]]] = {
    "training loss": ("nats per token", lambda curve: _points(curve.updates, curve.loss)),
    "development loss": (
        "nats per token",
        lambda curve: _points(curve.development.updates, curve.development.loss),
    ),
    "learning rate": ("", lambda curve: _points(curve.updates, curve.learning_rate)),
    "gradient norm": ("before clipping", lambda curve: _points(curve.updates, curve.gradient_norm)),
}


def _points(updates: Sequence[int], values: Sequence[float]) -> Points:
    return list(zip(map(float, updates), values, strict=True))


def curves_section(trainings: Sequence[Training], colours: Mapping[str, int]) -> Section:
    """Loss, learning rate, gradient norm and development loss over updates."""
    known = [one for one in trainings if one.curve is not None and one.curve.updates]
    if not known:
        return not_measured(
            *CURVES, "No curves are stored with these models: they were made before curves were kept."
        )
    blocks: list[Block] = []
    if missing := [one.name for one in trainings if one not in known]:
        blocks.append(Paragraph(f"Without a stored curve: {', '.join(missing)}.", is_note=True))
    if rises := [f"{one.name}: {rise.sentence}" for one in known if one.curve and (rise := one.curve.rise())]:
        blocks.append(Paragraph(f"A lower learning rate may do better: {'; '.join(rises)}.", is_note=True))
    figures = [figure for name in _PLOTS if (figure := _plot(name, known, colours)) is not None]
    return Section(*CURVES, [*blocks, Figures(figures, _keys(known, colours))])


def _keys(trainings: Sequence[Training], colours: Mapping[str, int]) -> list[Key]:
    keys: dict[int, Key] = {}
    for one in trainings:
        colour = _colour(one, colours)
        keys.setdefault(colour, Key("experts" if colour == OTHERS else one.name, colour))
    return list(keys.values())


def _colour(training: Training, colours: Mapping[str, int]) -> int:
    """Experts are drawn in their colours only where seed and baseline leave them enough."""
    if training.role == "expert":
        own = colours.get(training.name, OTHERS)
        return own if max(colours.values()) < SEED_COLOUR else OTHERS
    return SEED_COLOUR if training.role == "seed" else BASELINE_COLOUR


def _plot(name: str, trainings: Sequence[Training], colours: Mapping[str, int]) -> Figure | None:
    unit, points_of = _PLOTS[name]
    lines = [
        Line(one.name, points, _colour(one, colours), one.role == "transformer-lm")
        for one in trainings
        if one.curve is not None and (points := points_of(one.curve))
    ]
    if not lines:
        return None
    rows = [
        [line.name, f"{line.points[0][0]:,.0f}", f"{line.points[-1][0]:,.0f}", *_span(line.points)]
        for line in lines
    ]
    headings = ["training", "from update", "to update", "first", "last", "lowest"]
    title = f"{name}, {unit}" if unit else name
    svg = draw_lines(name, lines, ("updates", title))
    return Figure(svg, f"{name[0].upper()}{name[1:]} over updates.", Table(name, headings, rows))


def _span(points: Points) -> list[str]:
    values = [value for _, value in points]
    return [f"{value:.4g}" for value in (values[0], values[-1], min(values))]


def timeline_section(runs: Sequence[tuple[str, Timeline]], price: float | None, logs: str) -> Section:
    """The timeline of the newest run that trained something, and all runs with their cost.

    `price` is of a GPU-hour; `logs` is where the curves of runs lie.
    """
    if not runs:
        return not_measured(*TIMELINE, "No run left a timeline in this store.")
    trained = (one for one in runs if any(event.kind == "train" for event in one[1].events))
    name, timeline = next(trained, runs[0])
    blocks: list[Block] = [_gantt(name, timeline), _totals_table(timeline)]
    if found := mishaps(timeline):
        rows = [
            [
                event.label,
                event.what,
                str(event.attempt),
                duration(event.began - timeline.began),
                event.cause or "",
            ]
            for event in found[:MISHAPS_SHOWN]
        ]
        blocks.append(Table("Failures and stops", ["step", "what", "attempt", "after", "cause"], rows))
    blocks += [_runs_table(runs[:RUNS_SHOWN], price)]
    blocks.append(Paragraph(f"Curves for TensorBoard: {logs.rstrip('/')}/{name}", is_note=True))
    return Section(*TIMELINE, blocks)


def _gantt(name: str, timeline: Timeline) -> Figure:
    lanes, left_out = lanes_of(timeline)
    busy, seconds = busy_of(timeline), seconds_of(timeline)
    svg = draw_gantt("Timeline of the run", lanes, busy, seconds)
    idle = share_text(busy.idle)
    caption = (
        f"`btm {timeline.command}`, run {name}: {duration(seconds)}. {busy.device} were without a step {idle} "
        "of the time."
    )
    if any(event.what == "wait" for event in timeline.events):
        caption += (
            f" Grey: steps that could have begun and waited until some of the {busy.total:g} {busy.device} were free; "
            "trainings wait for all that they ask for, and baselines for the experts."
        )
    if left_out:
        caption += f" The {len(lanes)} processes with the most work of {len(lanes) + left_out} are shown."
    if timeline.left_out:
        caption += f" {timeline.left_out:,} short steps are not shown."
    keys = {colour: what for what, colour in (what_of(event) for event in timeline.events)}
    rows = [
        [
            lane.name,
            str(len(lane.bars)),
            f"{sum(bar.end - bar.start for bar in lane.bars):.1f}",
            str(len(lane.marks)),
        ]
        for lane in lanes
    ]
    table = Table(
        "seconds by process", ["process", "steps and waits", "seconds", "checkpoints, failures"], rows
    )
    return Figure(svg, caption, table, [Key(what, colour) for colour, what in sorted(keys.items())])


def _totals_table(timeline: Timeline) -> Table:
    rows = [[what, f"{count:,}", f"{seconds:,.1f}"] for what, count, seconds in totals(timeline)]
    return Table("Where the time went, over all processes", ["what", "times", "seconds"], rows)


def _runs_table(runs: Sequence[tuple[str, Timeline]], price: float | None) -> Table:
    rows = []
    for name, timeline in runs:
        hours = timeline.gpu_seconds / 3600
        cost = [] if price is None else [f"{price * hours:,.2f}"]
        cpu_hours = f"{timeline.cpu_seconds / 3600:.3f}"
        rows.append(
            [
                name,
                timeline.command,
                timeline.outcome,
                duration(seconds_of(timeline)),
                f"{hours:.3f}",
                cpu_hours,
                *cost,
            ]
        )
    headings = ["run", "command", "outcome", "took", "GPU-hours", "CPU-hours"]
    return Table(
        "Runs in this store and what they took", headings + ([] if price is None else ["money"]), rows
    )
