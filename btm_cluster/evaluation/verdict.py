"""The verdict: perplexities of every system with intervals over documents, set
beside the baseline, and a plain sentence.

Pure: takes sums of log-probabilities by document and returns numbers and words. How they are shown is
`terminal/verdict.py`'s, which texts are left out of the comparison is `texts.py`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from btm_cluster.equations.mixture import interval, perplexity, resampled_perplexity

RESAMPLES = 1000
TRANSFORMER_LM = "Transformer-LM"
BEST_MILESTONE = "Transformer-LM at its best milestone"
"""A row where that is not the finished one."""
SEED = "seed"
PAPER_ENSEMBLE = "ensemble, paper's posterior"
CALIBRATED_ENSEMBLE = "ensemble, calibrated"
GATED_ENSEMBLE = "ensemble, learned gate"
SEEDED_ENSEMBLE = "ensemble with the seed, calibrated"
SEEDED_GATE = "ensemble with the seed, learned gate"
PAPER_DEMIX = "DEMix, paper's posterior"
CALIBRATED_DEMIX = "DEMix, calibrated"
FORESTS = (PAPER_ENSEMBLE, CALIBRATED_ENSEMBLE, GATED_ENSEMBLE, SEEDED_ENSEMBLE, SEEDED_GATE)
"""Systems that the last sentences judge."""
ADDED_LATER = "added later"
"""Why a domain is left out of the comparison that the forest got after its founding."""


@dataclass(frozen=True)
class SplitResult:
    """All systems on one split of one text: summed log-probability [D] by system,
    and tokens [D], by document."""

    text: str
    is_target: bool
    split: str
    logp: Mapping[str, torch.Tensor]
    tokens_D: torch.Tensor


@dataclass(frozen=True)
class Milestones:
    """The Transformer-LM's milestones by update: perplexities on development
    text, mean over the founding domains."""

    perplexities: Mapping[int, float]
    best: int

    @property
    def last(self) -> int:
        """The update of the finished model."""
        return max(self.perplexities)

    @property
    def is_finished_best(self) -> bool:
        return self.best == self.last

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "best": self.best,
            "last": self.last,
            "development": {str(u): p for u, p in self.perplexities.items()},
        }


@dataclass(frozen=True)
class Cell:
    """A perplexity, its 95 % interval, and its relative difference to the
    baseline with the paired interval."""

    perplexity: float
    interval: tuple[float, float]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A system on one split: a cell for each text, and for the means over those of a group.

    Groups are the domains and the targets that are compared on, `all` of these, and what is `left_out`,
    without a difference.
    """

    system: str
    cells: Mapping[str, Cell]
    means: Mapping[str, Cell]


@dataclass(frozen=True)
class Verdict:
    """Rows by split, the baseline that they are held against, and what it comes to."""

    baseline: str
    rows: Mapping[str, tuple[Row, ...]]
    sentence: str
    left_out: Mapping[str, str]
    """Texts from which the forest's experts learned and the baseline did not,
    or the other way round, and why."""
    milestones: Milestones | None = None
    """The Transformer-LM's, where one of them was chosen as the baseline."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "baseline": self.baseline,
            "sentence": self.sentence,
            "left_out": dict(self.left_out),
            "milestones": self.milestones.to_json() if self.milestones else None,
            "splits": {
                split: [
                    {
                        "system": row.system,
                        "means": {group: vars(cell) for group, cell in row.means.items()},
                        "texts": {text: vars(cell) for text, cell in row.cells.items()},
                    }
                    for row in rows
                ]
                for split, rows in self.rows.items()
            },
        }


def verdict(
    results: Sequence[SplitResult],
    left_out: Mapping[str, str] | None = None,
    milestones: Milestones | None = None,
    random_seed: int = 0,
) -> Verdict:
    """Tables for each split, and whether the forest beat the baseline.

    That is the Transformer-LM at its best milestone where it has that row, else the finished one, else the
    seed. The texts in `left_out`, each with a reason, are shown and not compared on.
    """
    left_out = left_out or {}
    systems = list(dict.fromkeys(system for result in results for system in result.logp))
    baseline = next((name for name in (BEST_MILESTONE, TRANSFORMER_LM) if name in systems), SEED)
    splits = dict.fromkeys(result.split for result in results)
    rows = {
        split: _rows(
            [result for result in results if result.split == split], systems, baseline, left_out, random_seed
        )
        for split in splits
    }
    sentence = _sentence(rows.get("test", ()), baseline, left_out, milestones)
    return Verdict(baseline, rows, sentence, left_out, milestones)


@dataclass(frozen=True)
class _Sampled:
    """A perplexity and its resamples [R]."""

    value: float
    resamples_R: torch.Tensor


def _rows(
    results: Sequence[SplitResult],
    systems: Sequence[str],
    baseline: str,
    left_out: Mapping[str, str],
    random_seed: int,
) -> tuple[Row, ...]:
    sampled: dict[str, dict[str, _Sampled]] = {system: {} for system in systems}
    for number, result in enumerate(results):
        logp_SD = torch.stack(list(result.logp.values()))
        values_S = perplexity(logp_SD, result.tokens_D)
        # A seed of its own for each text: documents of different texts are drawn independently.
        resamples_SR = resampled_perplexity(logp_SD, result.tokens_D, RESAMPLES, random_seed + number)
        for system, value, resamples_R in zip(result.logp, values_S, resamples_SR, strict=True):
            sampled[system][result.text] = _Sampled(float(value), resamples_R)
    compared = [result for result in results if result.text not in left_out]
    groups = {
        "domains": [result.text for result in compared if not result.is_target],
        "targets": [result.text for result in compared if result.is_target],
        "all": [result.text for result in compared],
        "left_out": [result.text for result in results if result.text in left_out],
    }
    return tuple(
        Row(
            system,
            {text: _cell(value, reference.get(text)) for text, value in sampled[system].items()},
            {
                group: _cell(
                    _mean(sampled[system], texts), _mean(reference, texts) if texts[0] in reference else None
                )
                for group, texts in groups.items()
                if texts and all(text in sampled[system] for text in texts)
            },
        )
        for system in systems
        for reference in [{} if system == baseline else {t: sampled[baseline][t] for t in groups["all"]}]
    )


def _mean(sampled: Mapping[str, _Sampled], texts: Sequence[str]) -> _Sampled:
    """The mean of perplexities over texts, as the paper's tables take it."""
    values = [sampled[text].value for text in texts]
    return _Sampled(
        sum(values) / len(values), torch.stack([sampled[text].resamples_R for text in texts]).mean(0)
    )


def _cell(system: _Sampled, baseline: _Sampled | None) -> Cell:
    if baseline is None:
        return Cell(system.value, interval(system.resamples_R))
    return Cell(
        system.value,
        interval(system.resamples_R),
        system.value / baseline.value - 1,
        interval(system.resamples_R / baseline.resamples_R - 1),
    )


def _sentence(
    rows: Sequence[Row], baseline: str, left_out: Mapping[str, str], milestones: Milestones | None
) -> str:
    """Whether the forest beat the baseline on test text, where it did not, which
    one that is, and what is left out."""
    judged = [row for row in rows if row.system in FORESTS and "all" in row.means]
    sentences = [_judge(row, baseline, bool(left_out)) for row in judged]
    if not judged:
        sentences = [
            f"The forest is not compared with the {baseline}: there is no test text to compare them on."
        ]
    elif milestones:
        sentences.append(_which_milestone(milestones))
    if left_out:
        reasons = {
            reason: [t for t, why in left_out.items() if why == reason] for reason in left_out.values()
        }
        listed = "; ".join(f"{', '.join(texts)} ({reason})" for reason, texts in reasons.items())
        sentences.append(f"Not compared on, since only one side learned from it: {listed}.")
        if added := reasons.get(ADDED_LATER):
            sentences.append(f"The {baseline} never saw {', '.join(added)}.")
        if added and any("targets" in row.means for row in judged):
            sentences.append(
                f"On targets the forest has more training than the {baseline}: that of what was added later."
            )
    return " ".join(sentences)


def _which_milestone(milestones: Milestones) -> str:
    updates = [f"{update:,}" for update in sorted(milestones.perplexities)]
    of_all = f"of updates {', '.join(updates[:-1])} and {updates[-1]} it has the lowest perplexity on the founding domains'"
    which = "finished one" if milestones.is_finished_best else f"one at update {milestones.best:,}"
    return f"That Transformer-LM is the {which}: {of_all} development text."


def _judge(row: Row, baseline: str, is_partial: bool) -> str:
    mean = row.means["all"]
    assert mean.difference is not None
    assert mean.difference_interval is not None
    low, high = mean.difference_interval
    outcome = "beat" if high < 0 else "lost to" if low > 0 else "can not be told apart from"
    compared = {text: cell.difference for text, cell in row.cells.items() if cell.difference is not None}
    over = f"over {len(compared)} texts that both or neither learned from" if is_partial else "over all texts"
    lost = [text for text, difference in compared.items() if difference >= 0]
    every = "each of them" if is_partial else "every text"
    where = f" It was no better on: {', '.join(lost)}." if lost else f" It was better on {every}."
    return (
        f"The {row.system}, {outcome} the {baseline}: test perplexity {mean.perplexity:.2f}, "
        f"{mean.difference:+.1%} (95 % interval {low:+.1%} to {high:+.1%}) {over}.{where}"
    )
