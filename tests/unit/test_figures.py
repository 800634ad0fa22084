"""Figures of a report: the geometry of each drawing against the values that it is made from."""

import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from btm_cluster.ledger.timelines import Event
from btm_cluster.report.bars import draw_bars
from btm_cluster.report.drawing import Drawing, Scale, tick_labels, ticks, time_ticks
from btm_cluster.report.gantt import draw_gantt, merged
from btm_cluster.report.heat_map import draw_heat_map
from btm_cluster.report.intervals import Measured, draw_intervals
from btm_cluster.report.line_chart import Line, below, draw_lines, thinned
from btm_cluster.report.lineage_graph import draw_lineage, lives_of
from btm_cluster.report.timeline import Bar, busy_of, lanes_of, mishaps, seconds_of, totals
from tests.made_report import made_timeline, made_versions

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> Element:
    """A drawing, which says what it shows."""
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"]
    assert all(child.text for child in root[:2])
    return root


def of_class(root: Element, tag: str, css: str) -> list[Element]:
    return [one for one in root.iter(f"{SVG}{tag}") if css in (one.get("class") or "").split()]


def number(element: Element, name: str) -> float:
    return float(element.get(name) or "nan")


def words_of(root: Element) -> list[str]:
    return [one.text or "" for one in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.13, 0.02), (3, 7.2), (0, 12_345), (1e-5, 9e-5), (5, 5)]
)
def test_ticks_are_round_within_and_few(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert len(set(tick_labels(found))) == len(found)


@pytest.mark.parametrize(
    ("seconds", "last"), [(45, (40.0, "40 s")), (770, (720.0, "12 min")), (9000, (9000.0, "2.5 h"))]
)
def test_times_are_round_in_the_unit_that_they_are_said_in(seconds: float, last: tuple[float, str]) -> None:
    assert time_ticks(seconds, 8)[-1] == last


def test_a_scale_of_one_value_has_a_place_for_it() -> None:
    assert Scale(3, 3, 0, 10)(3) == 0


def test_names_that_are_markup_stay_words_and_characters_that_xml_cannot_have_are_replaced() -> None:
    drawing = Drawing(10, 10, "<script>", "a & b")
    drawing.text(0, 0, "</svg>\x00")
    root = parsed(drawing.svg())
    assert words_of(root) == ["</svg>\N{REPLACEMENT CHARACTER}"]
    assert root[0].text == "<script>"


def test_intervals_lie_where_their_values_are_and_are_coloured_by_what_they_mean() -> None:
    rows = [
        Measured("better", -0.1, -0.12, -0.08),
        Measured("same", 0.0, -0.02, 0.02),
        Measured("worse", 0.05, 0.04, 0.06),
    ]
    root = parsed(draw_intervals("systems", rows, "the baseline"))
    bars = {css: of_class(root, "line", css)[0] for css in ("better", "same", "worse")}
    dots = {css: of_class(root, "circle", css)[0] for css in bars}
    (zero,) = of_class(root, "line", "zero")
    assert number(bars["better"], "x2") < number(zero, "x1") < number(bars["worse"], "x1")
    # One scale for all: pixels per unit are the same everywhere.
    per_unit = (number(dots["worse"], "cx") - number(dots["better"], "cx")) / 0.15
    assert number(bars["same"], "x2") - number(bars["same"], "x1") == pytest.approx(0.04 * per_unit, abs=0.05)
    assert number(dots["same"], "cx") == pytest.approx(number(zero, "x1"), abs=0.05)
    assert {"−10 %", "0 %", "+5 %"} <= set(words_of(root))


def test_a_system_that_is_far_worse_does_not_press_the_others_together() -> None:
    rows = [
        Measured("good", -0.1, -0.11, -0.09),
        Measured("fair", -0.05, -0.06, -0.04),
        Measured("awful", 9.0, 8.0, 10.0),
    ]
    root = parsed(draw_intervals("systems", rows, "the baseline"))
    good, fair = of_class(root, "circle", "better")
    assert number(fair, "cx") - number(good, "cx") > 50
    assert not of_class(root, "circle", "worse")
    assert of_class(root, "path", "worse"), "an arrow: it is beyond the scale"
    assert "+900.0 %" in words_of(root)


def points(line: Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in (line.get("points") or "").split())]


def test_curves_share_their_axes_and_higher_values_lie_higher() -> None:
    low = Line("low", [(0, 1.0), (10, 2.0)], 0)
    high = Line("high", [(5, 3.0), (10, 4.0)], 1, is_dashed=True)
    root = parsed(draw_lines("loss", [low, high], ("updates", "loss"), level=("baseline", 2.0)))
    first, second = (points(line) for line in root.iter(f"{SVG}polyline"))
    assert [x for x, _ in second] == pytest.approx([(first[0][0] + first[1][0]) / 2, first[1][0]], abs=0.1)
    assert first[0][1] - first[1][1] == pytest.approx(second[0][1] - second[1][1], abs=0.2)
    (level,) = of_class(root, "line", "level")
    assert number(level, "y1") == pytest.approx(first[1][1], abs=0.1)
    assert of_class(root, "polyline", "dashed")[0].get("class") == "line c1 dashed"


def test_a_line_is_cut_where_it_rises_above_the_most_and_goes_on_where_it_comes_back() -> None:
    line = [(0.0, 1.0), (1.0, 3.0), (2.0, 9.0), (3.0, 1.0), (4.0, 1.5)]
    assert below(line, 2.0) == [[(0, 1), (0.5, 2)], [(2.875, 2), (3, 1), (4, 1.5)]]
    assert below(line, 9.0) == [line]
    assert below(line, 0.5) == []
    root = parsed(draw_lines("loss", [Line("one", line, 0)], ("x", "y"), most=2.0, has_legend=True))
    assert all(y >= 20 for line in root.iter(f"{SVG}polyline") for _, y in points(line))
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    assert "one" in words_of(root)


def test_a_long_curve_keeps_its_ends() -> None:
    kept = thinned([(float(n), n**2) for n in range(10_000)], 50)
    assert (len(kept), kept[0], kept[-1]) == (50, (0.0, 0), (9999.0, 9999**2))


def cells(root: Element) -> dict[tuple[int, int], int]:
    """The shade of each cell by row and column."""
    found = {}
    for path in root.iter(f"{SVG}path"):
        for column, row in re.findall(r"M(\d+) (\d+)h", path.get("d") or ""):
            found[int(row), int(column)] = int((path.get("class") or "").removeprefix("h"))
    return found


def test_a_heat_map_is_darker_where_values_are_higher_and_empty_where_there_are_none() -> None:
    shades = [[0.0, 0.5, 1.0], [None, 0.25, 2.0]]
    root = parsed(
        draw_heat_map(
            "map", "what", ["law", "code"], ["a", "b", "c"], shades, [["0", "5", "1"], ["", "2", "2"]]
        )
    )
    assert cells(root) == {(0, 0): 0, (0, 1): 5, (0, 2): 10, (1, 1): 2, (1, 2): 10}
    assert {"law", "code", "a", "b", "c", "5"} <= set(words_of(root))


def test_a_heat_map_of_64_experts_is_small_and_names_every_row_and_column() -> None:
    names = [f"name-{n}" for n in range(64)]
    shades = [[(i * j % 11) / 10 for j in range(64)] for i in range(64)]
    svg = draw_heat_map("map", "what", names, names, shades, [["99"] * 64] * 64)
    assert len(svg) < 100_000
    root = parsed(svg)
    assert len(cells(root)) == 64 * 64
    assert sorted(words_of(root)) == sorted(names * 2)


def test_bars_are_as_long_as_their_values_and_go_left_below_zero() -> None:
    root = parsed(draw_bars("worth", [("a", 4.0), ("b", 1.0), ("c", -1.0)]))
    a, b, c = root.iter(f"{SVG}rect")
    assert number(a, "width") == pytest.approx(4 * number(b, "width"), abs=0.1)
    assert number(c, "x") + number(c, "width") == pytest.approx(number(b, "x"), abs=0.1)


def test_a_timeline_has_a_lane_for_each_process_and_says_how_long_gpus_were_idle() -> None:
    timeline = made_timeline(["law", "code"], ["law"])
    lanes, left_out = lanes_of(timeline)
    assert left_out == 0
    assert [lane.name for lane in lanes] == [
        "other steps on host-a", "seed on host-a", "law on host-a", "code on host-b", "other steps on host-b", "waiting steps",
    ]  # fmt: skip
    (seed,) = (lane for lane in lanes if lane.name == "seed on host-a")
    assert [(bar.what, bar.start, bar.end) for bar in seed.bars] == [
        ("starting", 2.5, 5.5),
        ("training", 5.5, 65.5),
    ]
    assert [mark.what for mark in seed.marks] == ["checkpoint"]
    assert [(bar.what, bar.end - bar.start) for bar in lanes[3].bars] == [
        ("waiting for capacity", 1),
        ("training", 29),
    ]
    assert [(bar.start, bar.end) for bar in lanes[5].bars] == [(0, 1)], "two wait at once"
    busy = busy_of(timeline)
    steps = 60 + 2 * 29 + 2 * 0.01 * 0.5
    assert (busy.device, busy.total) == ("GPUs", 2)
    assert busy.used_seconds == pytest.approx(steps)
    assert busy.idle == pytest.approx(1 - steps / (2 * seconds_of(timeline)))
    assert max(count for _, count in busy.steps) == 2
    assert [event.cause for event in mishaps(timeline)] == ["out of memory"]
    assert totals(timeline)[0] == ("training", 3, pytest.approx(60 + 2 * 29))


def test_lanes_have_no_hashes_and_nothing_but_a_training_waits_in_a_lane_of_its_own() -> None:
    """Ray's names of processes have hashes, and averages that waited took a lane each."""
    fields = {"node": "a", "cpus": 1.0}
    trainer = {"kind": "train", "role": "expert", "label": "law", "process": "expert-law-89a94e5d-ffd790"}
    merger = {"kind": "average", "label": "law", "process": "merge-1795969806620987"}
    events = [
        Event.model_validate(fields | of | {"what": what, "began": began, "ended": began + 2})
        for of, what, began in (
            (trainer, "start", 1.5),
            (trainer, "step", 3.5),
            (merger, "step", 5.0),
            (merger, "step", 5.5),
        )
    ]
    waits = [
        one.model_copy(update={"what": "wait", "node": None, "began": 2, "ended": 3.6}) for one in events
    ]
    made = made_timeline(["law"], ["law"])
    timeline = made.model_copy(update={"began": 0, "ended": 10, "events": [*waits, *events]})
    lanes, _ = lanes_of(timeline)
    shown = {lane.name: [bar.what for bar in lane.bars] for lane in lanes}
    assert shown == {
        "expert law": ["starting", "waiting for capacity", "training"],
        "1. averages": ["fitting, mixing, averaging"],
        "2. averages": ["fitting, mixing, averaging"],
        "waiting steps": ["waiting for capacity"],
    }
    assert max(count for _, count in busy_of(timeline).steps) <= busy_of(timeline).total


def test_a_process_that_trains_several_models_has_one_lane_in_which_the_first_of_them_waits() -> None:
    """Waits of the others began before the first one's training, and cut its bar short."""
    fields = {"kind": "train", "role": "expert", "process": "expert-law-89a94e5d-ffd790"}
    spans = {"law": (0, 3, 5), "code": (0, 5, 7), "games": (0, 7, 9)}
    events = [
        Event.model_validate(
            fields | {"what": what, "label": label, "node": node, "began": began, "ended": ended}
        )
        for label, (asked, start, end) in spans.items()
        for what, node, began, ended in (("wait", None, asked, start), ("step", "a", start, end))
    ]
    made = made_timeline(["law"], ["law"])
    timeline = made.model_copy(
        update={"began": 0, "ended": 10, "events": sorted(events, key=lambda one: one.began)}
    )
    lanes, _ = lanes_of(timeline)
    shown = {lane.name: [(bar.what, bar.start, bar.end) for bar in lane.bars] for lane in lanes}
    trained = [("training", start, end) for _, start, end in spans.values()]
    assert shown == {
        "expert law and 2 more": [("waiting for capacity", 0, 3), *trained],
        "waiting steps": [("waiting for capacity", 0, 7)],
    }


def test_bars_of_a_timeline_lie_at_their_seconds() -> None:
    timeline = made_timeline(["law", "code"], ["law"])
    lanes, _ = lanes_of(timeline)
    root = parsed(draw_gantt("timeline", lanes, busy_of(timeline), seconds_of(timeline)))
    bars = [one for one in root.iter(f"{SVG}rect") if one.get("class") == "c0"]
    tips = {(one[0].text or "").partition(":")[0]: one for one in bars}
    assert set(tips) == {"seed", "law", "code"}
    assert "attempt 2" in (tips["law"][0].text or "")
    per_second = number(tips["seed"], "width") / 60
    assert number(tips["law"], "width") == pytest.approx(29 * per_second, abs=0.1)
    assert number(tips["law"], "x") - number(tips["seed"], "x") == pytest.approx(61 * per_second, abs=0.1)


def test_thousands_of_short_steps_become_a_few_rectangles() -> None:
    bars = [Bar("scoring", 1, n / 100, (n + 1) / 100, "one") for n in range(5000)]
    (one,) = merged(bars, 0.1)
    assert (one.start, one.end) == (0, 50)
    assert one.tip.startswith("5000 × scoring")
    apart = [
        Bar("scoring", 1, 0, 1, "first"),
        Bar("training", 0, 1, 2, "other"),
        Bar("scoring", 1, 9, 10, "last"),
    ]
    assert list(merged(apart, 0.1)) == apart


def test_tasks_that_run_at_once_lie_in_several_lanes_and_only_the_busiest_are_shown() -> None:
    domains = [f"d{n:02d}" for n in range(50)]
    lanes, left_out = lanes_of(made_timeline(domains, ["law"]))
    assert (len(lanes), left_out) == (40, 14)
    for lane in lanes:
        assert all(
            one.end <= other.start + 1e-3 for one, other in zip(lane.bars, lane.bars[1:], strict=False)
        )


def test_the_lineage_has_a_line_for_each_expert_from_its_first_version_to_its_last() -> None:
    versions = made_versions(["harbour", "kitchen", "orchard"])
    lives = {life.domain: (life.first, life.last) for life in lives_of(versions)}
    assert lives == {"harbour": (1, 3), "kitchen": (1, 3), "lost": (1, 2), "orchard": (2, 3)}
    root = parsed(draw_lineage("lineage", versions, {"harbour": 0, "kitchen": 1, "orchard": 2}))
    assert [word for word in words_of(root) if word.startswith("version")] == [
        f"version {n}" for n in range(4)
    ]
    rings = of_class(root, "circle", "ring")
    heights = {one.text: number(one, "y") - 4 for one in root.iter(f"{SVG}text")}
    assert [number(ring, "cy") for ring in rings] == pytest.approx([heights["lost"]])
    branches = of_class(root, "path", "branch")
    starts = [float((path.get("d") or "").partition("C")[0].split()[1]) for path in branches]
    assert sorted(starts) == pytest.approx(
        sorted([heights["seed"]] * 3 + [heights["harbour"], heights["kitchen"]])
    )
    widths = [number(path, "stroke-width") for path in branches]
    assert max(widths) == pytest.approx(3.0)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return math.fsum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def themes() -> Sequence[dict[str, str]]:
    from btm_cluster.report.page import style_sheet

    blocks = re.findall(r":root \{(.*?)\}", style_sheet(), re.DOTALL)
    return [dict(re.findall(r"(--\w+): (#\w{6})", block)) for block in blocks]


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark", "print"])
def test_words_and_figures_stand_out_from_the_paper(theme: dict[str, str]) -> None:
    for name in ("--ink", "--soft", "--good", "--bad", "--accent"):
        for ground in ("--paper", "--panel"):
            assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    for number in range(8):
        assert contrast(theme[f"--c{number}"], theme["--paper"]) >= 3, number
