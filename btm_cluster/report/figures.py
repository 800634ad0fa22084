"""The figures of a study's page, as SVG and PNG."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from btm_cluster.report.entries import (
    BASELINES,
    CALIBRATED,
    PAPERS,
    PLAIN,
    Wanted,
    main_entries,
    select,
    spread,
)
from btm_cluster.report.results import Entry, Results

FIGURE_1: dict[str, Wanted] = {
    "ensemble, paper's posterior": {"system": "forest", **PAPERS, **PLAIN},
    "ensemble, calibrated": {"system": "forest", **CALIBRATED, **PLAIN},
    "average, posterior (ema)": {"system": "average", "prior": "ema"},
    "average, posterior (fitted)": {"system": "average", "prior": "fitted"},
    "average, uniform": {"system": "average", "prior": "uniform"},
    "seed": {"system": "seed"},
}


def draw_figures(results: Results, folder: Path) -> Iterator[str]:
    """Writes each figure to the folder, and yields its section of the page."""
    for size in dict.fromkeys(entry["size"] for entry in results.entries):
        entries = select(results.entries, size=size)
        shares = sorted({entry["seed_share"] for entry in entries if entry["seed_share"] is not None})
        if len(shares) > 2:
            swept, seeds = of_every_share(entries, shares)
            curves = {name: _curve(swept, wanted, "seed_share") for name, wanted in FIGURE_1.items()}
            _draw(curves, _baseline(swept), "seed share", folder / f"seed-share-{size}")
            heading = (
                f"## Figure 1: perplexity over seed share, {size}, random seed {', '.join(map(str, seeds))}"
            )
            yield f"{heading}\n\n![seed share](seed-share-{size}.svg)\n"
        tops = main_entries(entries)
        curves = {
            name: _curve(tops, {"system": "forest", "development_blocks": None, **posterior}, "top_k")
            for name, posterior in (("paper's posterior", PAPERS), ("calibrated", CALIBRATED))
        }
        if any(len(points) > 1 for points in curves.values()):
            _draw(curves, _baseline(tops), "experts kept, of the largest prior", folder / f"top-k-{size}")
            yield f"## Top-k, {size}\n\n![top-k](top-k-{size}.svg)\n"


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


def _draw(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    compared_with: tuple[str, float],
    over: str,
    file: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "btm"  # the same results give the same bytes
    from matplotlib import pyplot

    called, baseline = compared_with
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label=called)
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    values = [baseline, *(value for points in curves.values() for _, value in points)]
    highest = 1.6 * baseline  # averages without a seed leave the picture
    axes.set_ylim(0.95 * min(values), min(highest, 1.05 * max(values)))
    axes.set(xlabel=over, ylabel="test perplexity, all texts")
    axes.legend(frameon=False, fontsize="small")
    for ending in ("svg", "png"):
        figure.savefig(
            file.with_suffix(f".{ending}"), dpi=150, metadata={"Date": None} if ending == "svg" else None
        )
    pyplot.close(figure)
