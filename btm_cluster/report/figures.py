"""The curves of a study: perplexity over seed share, experts kept, and development blocks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.report.content import Figure, Table
from btm_cluster.report.entries import (
    BASELINES,
    CALIBRATED,
    GATE,
    PAPERS,
    PLAIN,
    Wanted,
    main_entries,
    select,
    spread,
)
from btm_cluster.report.line_chart import Line, Points, draw_lines
from btm_cluster.report.results import Entry, Results

FIGURE_1: dict[str, Wanted] = {
    "ensemble, paper's posterior": {"system": "forest", **PAPERS, **PLAIN},
    "ensemble, calibrated": {"system": "forest", **CALIBRATED, **PLAIN},
    "average, posterior (ema)": {"system": "average", "prior": "ema"},
    "average, posterior (fitted)": {"system": "average", "prior": "fitted"},
    "average, uniform": {"system": "average", "prior": "uniform"},
    "seed": {"system": "seed"},
}
_POSTERIORS: dict[str, Wanted] = {"paper's posterior": PAPERS, "calibrated": CALIBRATED}
_FITTED: dict[str, Wanted] = {
    "calibrated": CALIBRATED,
    "discounts": {"posterior": "discounts", "prior": "fitted"},
    "learned gate": GATE,
}
WIDTH, HEIGHT = 480, 300
FAR_ABOVE = 1.6
"""Times the baseline: averages without a seed leave the drawing."""


@dataclass(frozen=True)
class StudyFigure:
    """A figure and the heading that it stands under."""

    heading: str
    figure: Figure


def study_figures(results: Results) -> Iterator[StudyFigure]:
    """The figures of each size that a study measured enough for."""
    for size in dict.fromkeys(entry["size"] for entry in results.entries):
        entries = select(results.entries, size=size)
        shares = sorted({entry["seed_share"] for entry in entries if entry["seed_share"] is not None})
        if len(shares) > 2:
            swept, seeds = of_every_share(entries, shares)
            curves = {name: _curve(swept, wanted, "seed_share") for name, wanted in FIGURE_1.items()}
            heading = (
                f"Figure 1: perplexity over seed share, {size}, random seed {', '.join(map(str, seeds))}"
            )
            yield _figure(heading, curves, _baseline(swept), "seed share", f"seed-share-{size}.svg")
        tops = main_entries(entries)
        curves = {
            name: _curve(tops, {"system": "forest", "development_blocks": None, **posterior}, "top_k")
            for name, posterior in _POSTERIORS.items()
        }
        if any(len(points) > 1 for points in curves.values()):
            over = "experts kept, of the largest prior"
            yield _figure(f"Top-k, {size}", curves, _baseline(tops), over, f"top-k-{size}.svg")
        curves = {
            name: _curve(tops, {"system": "forest", "top_k": None, **posterior}, "development_blocks")
            for name, posterior in _FITTED.items()
        }
        if any(len(points) > 1 for points in curves.values()):
            over, file = "development blocks that are fitted on", f"development-blocks-{size}.svg"
            yield _figure(f"Development blocks, {size}", curves, _baseline(tops), over, file)


def of_every_share(entries: Sequence[Entry], shares: Sequence[float]) -> tuple[list[Entry], list[int]]:
    """The entries of the random seeds that every seed share has, and these: others
    would move one point of a curve alone."""
    of_shares = [
        {entry["random_seed"] for entry in select(entries, system="forest", seed_share=s)} for s in shares
    ]
    seeds = sorted(set.intersection(*of_shares)) or sorted(set.union(*of_shares))
    return [entry for entry in entries if entry["random_seed"] in seeds], seeds


def _baseline(entries: Sequence[Entry]) -> tuple[str, float]:
    """The baseline of all differences: its name, and its perplexity on all texts."""
    found = {
        name: {e["random_seed"]: e["all"] for e in select(entries, **one)} for name, one in BASELINES.items()
    }
    finished, best = found.values()
    return [name for name, values in found.items() if values][-1], spread(
        list((finished | best).values())
    ).mean


def _curve(entries: Sequence[Entry], wanted: Wanted, over: str) -> list[tuple[float, float]]:
    """Perplexity on all texts over one field; where the field is empty, all experts are kept."""
    values: dict[float, list[float]] = {}
    for entry in select(entries, **wanted):
        value = entry["experts"] if over == "top_k" and entry[over] is None else entry[over]
        if value is not None and entry["all"] is not None:
            values.setdefault(float(value), []).append(entry["all"])
    return [(value, spread(seen).mean) for value, seen in sorted(values.items())]


def _figure(
    heading: str, curves: Mapping[str, Points], compared_with: tuple[str, float], over: str, file: str
) -> StudyFigure:
    drawn = {name: (number, points) for number, (name, points) in enumerate(curves.items()) if points}
    lines = [Line(name, points, colour) for name, (colour, points) in drawn.items()]
    axes, most = (over, "test perplexity, all texts"), FAR_ABOVE * compared_with[1]
    svg = draw_lines(heading, lines, axes, compared_with, most, (WIDTH, HEIGHT), has_legend=True)
    rows = [[name, f"{x:g}", f"{value:.2f}"] for name, (_, points) in drawn.items() for x, value in points]
    table = Table(heading, ["system", over, "perplexity"], rows)
    caption = f"Test perplexity over {over}; the dashed line is the {compared_with[0]}"
    return StudyFigure(heading, Figure(svg, caption, table, file=file))
