"""A verdict at a terminal: whether it was worth it, one table, and what else there is to know."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from btm_cluster.terminal.tables import fitting, plain_table, say, show_stacked, show_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from btm_cluster.evaluation.rows import Cell, Row
    from btm_cluster.evaluation.verdict import Verdict

JUDGED_SPLIT = "test"


def show_verdict(verdict: "Verdict", console: "Console") -> None:
    """Prints the judgements, the table of test text, and the notes."""
    for judgement in verdict.judgements:
        say(judgement.sentence, console)
    if rows := verdict.rows.get(JUDGED_SPLIT):
        show_table(fitting(_means_tables(JUDGED_SPLIT, rows, verdict), console), console)
    for note in verdict.notes:
        say(note, console)


def show_verdict_details(verdict: "Verdict", console: "Console") -> None:
    """Prints the means of the other splits, and all texts of each split."""
    for split, rows in verdict.rows.items():
        if split != JUDGED_SPLIT:
            show_table(fitting(_means_tables(split, rows, verdict), console), console)
        texts = list(dict.fromkeys(text for row in rows for text in row.cells))
        headings = [
            f"{text}\n({verdict.left_out[text]})" if text in verdict.left_out else text for text in texts
        ]
        for what, as_text in (("Perplexity", _perplexity), ("Bits per byte", _bits_per_byte)):
            show_stacked(
                f"{what} on {split} text, by text{_fitted_on(split)}",
                ["system", *headings],
                [[row.system, *(as_text(row.cells.get(text)) for text in texts)] for row in rows],
                console,
            )


_SYSTEM, _COST, _ALL, _INTERVAL, _BITS, _DIFFERENCE = (
    "system",
    "cost",
    "all",
    "95 % interval",
    "bits per\nbyte",
    "difference",
)
_ALWAYS = (_SYSTEM, _COST, _ALL, _BITS, _DIFFERENCE)


def _means_tables(split: str, rows: Sequence["Row"], verdict: "Verdict") -> list["Table"]:
    """The same table narrower and narrower: without the interval, without groups of texts, with a
    difference's interval below it, and with a system's name on several lines."""
    every = _columns(rows, verdict)
    least = {name: every[name] for name in _ALWAYS}
    no_interval = {name: cells for name, cells in every.items() if name != _INTERVAL}
    stacked = {name: [_stacked(cell) for cell in cells] for name, cells in least.items()}
    tables = [_means_table(split, columns) for columns in (every, no_interval, least, stacked, stacked)]
    tables[-1].columns[0].no_wrap = False
    return tables


def _stacked(cell: str) -> str:
    return cell.replace(" (", "\n(").replace(") on ", ")\non ")


def _means_table(split: str, columns: Mapping[str, Sequence[str]]) -> "Table":
    rows = list(zip(*columns.values(), strict=True))
    table = plain_table(
        f"Perplexity on {split} text, mean over texts{_fitted_on(split)}", list(columns), rows
    )
    for column in table.columns:
        column.no_wrap = True
    return table


def _columns(rows: Sequence["Row"], verdict: "Verdict") -> dict[str, list[str]]:
    """Cells by heading."""
    from btm_cluster.evaluation.rows import cost_text

    groups = {"domains": "domains", "targets": "targets"}
    if verdict.left_out:
        groups = {"domains": "founding domains", "targets": "targets", "left_out": "left out"}
    intervals = [_intervals(row) for row in rows]
    return {
        _SYSTEM: [row.system for row in rows],
        _COST: ["–" if row.inference_cost is None else f"{cost_text(row.inference_cost)}x" for row in rows],
        **{heading: [_perplexity(row.means.get(group)) for row in rows] for group, heading in groups.items()},
        _ALL: [_perplexity(row.means.get("all")) for row in rows],
        _INTERVAL: [interval for interval, _ in intervals],
        _BITS: [_bits_per_byte(row.means.get("all")) for row in rows],
        _DIFFERENCE: [difference for _, difference in intervals],
    }


def _fitted_on(split: str) -> str:
    return "; what is fitted was fitted on this very text" if split == "development" else ""


def _perplexity(cell: "Cell | None") -> str:
    return "–" if cell is None else f"{cell.perplexity:.2f}"


def _bits_per_byte(cell: "Cell | None") -> str:
    return "–" if cell is None else f"{cell.bits_per_byte:.4f}"


def _intervals(row: "Row") -> tuple[str, str]:
    """The perplexity's and the difference's, of all texts; of the domains, and so
    marked, where the system has no others."""
    group = next((group for group in ("all", "domains") if group in row.means), None)
    if group is None:
        return "–", "–"
    cell, where = row.means[group], "" if group == "all" else f" on {group}"
    interval = f"{cell.interval[0]:.2f}–{cell.interval[1]:.2f}{where}"
    if cell.difference is None or cell.difference_interval is None:
        return interval, "–"
    low, high = cell.difference_interval
    return interval, f"{cell.difference:+.1%} ({low:+.1%} to {high:+.1%}){where}"
