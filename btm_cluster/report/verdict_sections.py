"""The verdict on a page: headline, tiles, and systems against each other with intervals."""

from collections.abc import Sequence

from btm_cluster.evaluation.judgement import Judgement
from btm_cluster.evaluation.rows import SEED, Cell, Row, cost_text, system_of_texts
from btm_cluster.evaluation.verdict import Verdict
from btm_cluster.report.content import Block, Figure, Section, Table, Tile, not_measured
from btm_cluster.report.drawing import share_text
from btm_cluster.report.intervals import Measured, draw_intervals

DASH = "–"
_GOOD = {"worth it": True, "not worth it": False, "undecided": None}


def headline(verdict: Verdict | None) -> tuple[str, bool | None]:
    """The outcome in one sentence, and whether it is good news."""
    if verdict is None:
        return "Not evaluated yet", None
    if not verdict.judgements:
        return f"Not compared with the {verdict.baseline}", None
    first = min(
        verdict.judgements, key=lambda one: ("worth it", "undecided", "not worth it").index(one.outcome)
    )
    as_what = f"as {'an' if first.kind == 'ensemble' else 'one'} {first.kind.removeprefix('single ')}"
    much = share_text(abs(first.difference), 1)
    if first.outcome == "undecided":
        return f"Undecided: {as_what}, the forest cannot be told apart from the {first.baseline}", None
    side = "below" if first.difference < 0 else "above"
    return (
        f"{first.outcome.capitalize()}: {as_what}, perplexity is {much} {side} the {first.baseline}’s",
        _GOOD[first.outcome],
    )


def lead(verdict: Verdict) -> str:
    """The paragraph below the headline: number of texts, intervals, the baseline, and notes."""
    sentences = []
    for texts in sorted({one.texts for one in verdict.judgements}):
        sentences.append(f"On {texts} test text{'s' * (texts > 1)}, with 95 % intervals over documents.")
    if verdict.baseline == SEED:
        sentences.append(
            "The baseline is the seed, which has had less training: with `baselines: [transformer-lm]` the plan "
            "compares at equal training cost."
        )
    return " ".join([*sentences, *verdict.notes])


def tiles(verdict: Verdict) -> list[Tile]:
    """The best system of each kind, and what they are held against."""
    found = [_tile(one) for one in verdict.judgements]
    row = next((row for row in verdict.rows.get("test", ()) if row.system == verdict.baseline), None)
    if row is not None and "all" in row.means:
        mean = row.means["all"]
        detail = f"perplexity, mean over texts; {mean.bits_per_byte:.3f} bits per byte; {_cost(row.inference_cost)}"
        found.append(Tile(f"Baseline: {verdict.baseline}", f"{mean.perplexity:.2f}", detail))
    return found


def _tile(one: Judgement) -> Tile:
    low, high = one.interval
    parts = [
        f"perplexity {one.perplexity:.2f}, interval {_signed(low)} to {_signed(high)}",
        _cost(one.inference_cost),
        system_of_texts(one.system),
    ]
    if one.no_better_on:
        parts.append(f"no better on {', '.join(one.no_better_on)}")
    name = f"Best {one.kind}: {one.outcome}"
    return Tile(name, _signed(one.difference), "; ".join(parts), _GOOD[one.outcome])


def _cost(cost: float | None) -> str:
    return "inference cost not known" if cost is None else f"{cost_text(cost)}× inference cost"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def systems_section(verdict: Verdict | None, why_not: str) -> Section:
    """Every system on test text, with intervals; then each text by itself."""
    name = ("systems", "Systems against each other")
    rows = [] if verdict is None else list(verdict.rows.get("test", ()))
    if verdict is None or not rows:
        return not_measured(*name, why_not or "No text of the plan has test documents.")
    table = _systems_table(rows, verdict)
    blocks: list[Block] = []
    measured = [
        Measured(row.system, cell.difference, *cell.difference_interval)
        for row in rows
        if (cell := row.means.get("all")) and cell.difference is not None and cell.difference_interval
    ]
    if measured:
        caption = (
            f"Perplexity on test text against the {verdict.baseline}: mean over texts, with its 95 % interval. "
            "The best is on top, and left of zero is better."
        )
        measured.sort(key=lambda one: one.value)
        svg = draw_intervals("Systems against the baseline", measured, f"the {verdict.baseline}")
        blocks.append(Figure(svg, caption, table, shows_data=True))
    else:
        blocks.append(table)
    blocks.append(_texts_table(rows, verdict))
    return Section(*name, blocks)


def _systems_table(rows: Sequence[Row], verdict: Verdict) -> Table:
    groups = {"domains": "domains", "targets": "targets", "all": "all", "left_out": "left out"}
    shown = {key: name for key, name in groups.items() if any(key in row.means for row in rows)}
    headings = ["system", "inference cost", *shown.values(), "interval", "bits per byte"]
    table = [
        [
            row.system,
            DASH if row.inference_cost is None else f"{cost_text(row.inference_cost)}×",
            *(_perplexity(row.means.get(group)) for group in shown),
            *_whole(row),
        ]
        for row in rows
    ]
    strong = [number for number, row in enumerate(rows) if _is_judged(row.system, verdict)]
    caption = "Perplexity on test text by system: means over texts"
    return Table(
        caption, [*headings, f"against the {verdict.baseline}", "interval of the difference"], table, strong
    )


def _is_judged(system: str, verdict: Verdict) -> bool:
    return system in [one.system for one in verdict.judgements]


def _perplexity(cell: Cell | None) -> str:
    return DASH if cell is None else f"{cell.perplexity:.2f}"


def _whole(row: Row) -> list[str]:
    """Interval, bits per byte and difference of all texts; of the domains, and so marked, where the system has
    no others."""
    group = next((group for group in ("all", "domains") if group in row.means), None)
    if group is None:
        return [DASH] * 4
    cell, where = row.means[group], "" if group == "all" else f" on {group}"
    bits = DASH if where else f"{cell.bits_per_byte:.3f}"
    shown = [f"{cell.interval[0]:.2f} to {cell.interval[1]:.2f}", bits]
    if cell.difference is None or cell.difference_interval is None:
        return [*shown, DASH, DASH]
    low, high = cell.difference_interval
    return [*shown, f"{_signed(cell.difference)}{where}", f"{_signed(low)} to {_signed(high)}"]


def _texts_table(rows: Sequence[Row], verdict: Verdict) -> Table:
    texts = list(dict.fromkeys(text for row in rows for text in row.cells))
    table = [
        [
            f"{text} (left out: {verdict.left_out[text]})" if text in verdict.left_out else text,
            *(_perplexity(row.cells.get(text)) for row in rows),
        ]
        for text in texts
    ]
    return Table("Perplexity on test text, by text", ["text", *(row.system for row in rows)], table)
