"""A verdict as one flat table, for services that show tables."""

from typing import Any

from btm_cluster.evaluation.verdict import Verdict


def table_of(verdict: Verdict) -> list[dict[str, Any]]:
    """A row for each split, group of texts and system: all with the same columns."""
    return [
        {
            "split": split,
            "mean over": group,
            "system": row.system,
            "inference cost": row.inference_cost,
            "perplexity": cell.perplexity,
            "low": cell.interval[0],
            "high": cell.interval[1],
            "bits per byte": cell.bits_per_byte,
            "difference": cell.difference,
            "difference low": cell.difference_interval[0] if cell.difference_interval else None,
            "difference high": cell.difference_interval[1] if cell.difference_interval else None,
        }
        for split, rows in verdict.rows.items()
        for group in dict.fromkeys(group for row in rows for group in row.means)
        for row in rows
        if (cell := row.means.get(group)) is not None
    ]
