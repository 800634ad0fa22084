"""The tables of a verdict: a system in each row, and the sentence below."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from btm_cluster.terminal.tables import plain_table, show_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from btm_cluster.evaluation.verdict import Cell, Row, Verdict


def verdict_tables(verdict: "Verdict", console: "Console") -> None:
    """Prints a table for each split, texts in columns, and the sentence."""
    for split, rows in verdict.rows.items():
        show_table(_means_table(split, rows, verdict), console)
        show_table(_texts_table(split, rows, verdict.left_out), console)
    console.print(verdict.sentence, soft_wrap=True)


def _means_table(split: str, rows: Sequence["Row"], verdict: "Verdict") -> "Table":
    groups = {"domains": "domains", "targets": "targets", "all": "all"}
    if verdict.left_out:
        groups = {
            "domains": "founding domains",
            "targets": "targets",
            "all": "all of these",
            "left_out": "left out",
        }
    table = plain_table(
        f"Perplexity on {split} text: means over texts, 95 % interval over documents{_fitted_on(split)}",
        ["system", *groups.values(), f"interval of {groups['all']}", f"against {verdict.baseline}"],
        [
            [row.system, *(_perplexity(row.means.get(group)) for group in groups), *_intervals(row)]
            for row in rows
        ],
    )
    table.columns[0].no_wrap = True
    return table


def _fitted_on(split: str) -> str:
    return "; what is fitted was fitted on this very text" if split == "development" else ""


def _perplexity(cell: "Cell | None") -> str:
    return "–" if cell is None else f"{cell.perplexity:.2f}"


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


def _texts_table(split: str, rows: Sequence["Row"], left_out: Mapping[str, str]) -> "Table":
    texts = list(dict.fromkeys(text for row in rows for text in row.cells))
    table = plain_table(
        f"Perplexity on {split} text, by text{_fitted_on(split)}",
        ["system", *(f"{text}\n({left_out[text]})" if text in left_out else text for text in texts)],
        [[row.system, *(_perplexity(row.cells.get(text)) for text in texts)] for row in rows],
    )
    table.columns[0].no_wrap = True
    return table
