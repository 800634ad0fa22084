"""Entries of a study's results: those that a row or a curve is made of,
and their spread over random seeds."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.report.results import Entry

Wanted = Mapping[str, object]

PAPERS: Wanted = {"posterior": "full", "prior": "ema"}

CALIBRATED: Wanted = {"posterior": "calibrated", "prior": "fitted"}

GATE: Wanted = {"posterior": "gate", "prior": "fitted"}

PLAIN: Wanted = {"development_blocks": None, "top_k": None}

BASELINES: dict[str, Wanted] = {
    "Transformer-LM": {"system": "transformer-lm"},
    "Transformer-LM at its best milestone": {"system": "transformer-lm at its best milestone"},
}


@dataclass(frozen=True)
class Spread:
    """A mean over random seeds, and the standard deviation where there are several."""

    mean: float
    deviation: float | None

    def formatted(self, pattern: str = "{:.1f}") -> str:
        """As in a table's cell."""
        written = pattern.format(self.mean)
        return (
            written if self.deviation is None else f"{written} ± {pattern.format(self.deviation).lstrip('+')}"
        )


def spread(values: Sequence[float]) -> Spread:
    """The spread of the same number under several random seeds."""
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def select(entries: Iterable[Entry], **wanted: object) -> list[Entry]:
    """The entries with these values."""
    return [entry for entry in entries if all(entry[name] == value for name, value in wanted.items())]


def main_entries(entries: Sequence[Entry]) -> list[Entry]:
    """The entries of the seed share that everything is compared at, and those that have none."""
    share = main_share(entries)
    return [entry for entry in entries if entry["seed_share"] in (None, share)]


def main_share(entries: Sequence[Entry]) -> float:
    """The seed share of the single experts, which are measured at one share alone."""
    return float(select(entries, system="best single expert")[0]["seed_share"])
