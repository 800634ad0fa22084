"""The verdict: perplexities of every system with intervals over documents, set
beside the baseline, and whether the forest was worth it.

Pure: takes sums of log-probabilities by document and returns numbers and words. How they are shown is
`terminal/verdict.py`'s, which texts are left out of the comparison is `texts.py`'s, and what is said of the
numbers is `judgement.py`'s. U is tokens and bytes, as `equations/perplexity.py` has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from btm_cluster.curve import Rise
from btm_cluster.equations.perplexity import (
    BYTES,
    TOKENS,
    bits_per_byte,
    interval,
    perplexity,
    resampled_perplexity,
)
from btm_cluster.evaluation.judgement import Judgement, judge, notes_on
from btm_cluster.evaluation.rows import BEST_MILESTONE, SEED, TRANSFORMER_LM, Cell, Milestones, Row

RESAMPLES = 1000


@dataclass(frozen=True)
class SplitResult:
    """All systems on one split of one text: summed log-probability [U, D] by system,
    and sizes [U, D], by document."""

    text: str
    is_target: bool
    split: str
    logp: Mapping[str, torch.Tensor]
    sizes_UD: torch.Tensor


@dataclass(frozen=True)
class Verdict:
    """Rows by split, the baseline that they are held against, and what it comes to."""

    baseline: str
    rows: Mapping[str, tuple[Row, ...]]
    judgements: tuple[Judgement, ...]
    """Judgements of the best ensemble, single model and mixture of experts; empty without a text to compare on."""
    notes: tuple[str, ...]
    """Sentences for the reader of the judgements: the baseline, and texts that are left out."""
    left_out: Mapping[str, str]
    """Texts from which the forest's experts learned and the baseline did not,
    or the other way round, and why."""
    milestones: Milestones | None = None
    """The Transformer-LM's, where one of them was chosen as the baseline."""

    @property
    def sentence(self) -> str:
        """Judgements and notes as one text."""
        return " ".join([*(one.sentence for one in self.judgements), *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "baseline": self.baseline,
            "sentence": self.sentence,
            "judgements": [asdict(one) | {"sentence": one.sentence} for one in self.judgements],
            "left_out": dict(self.left_out),
            "milestones": self.milestones.to_json() if self.milestones else None,
            "splits": {
                split: [
                    {
                        "system": row.system,
                        "inference_cost": row.inference_cost,
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
    costs: Mapping[str, float] | None = None,
    rise: Rise | None = None,
    random_seed: int = 0,
) -> Verdict:
    """Tables for each split, and whether the forest was worth it.

    That is the Transformer-LM at its best milestone where it has that row, else the finished one, else the
    seed. The texts in `left_out`, each with a reason, are shown and not compared on. `costs` are forward
    passes for a token, by system. `rise` is that of the Transformer-LM's training loss, if it rose.
    """
    left_out = left_out or {}
    systems = list(dict.fromkeys(system for result in results for system in result.logp))
    baseline = next((name for name in (BEST_MILESTONE, TRANSFORMER_LM) if name in systems), SEED)
    splits = dict.fromkeys(result.split for result in results)
    rows = {
        split: _rows(
            [result for result in results if result.split == split],
            {system: (costs or {}).get(system) for system in systems},
            baseline,
            left_out,
            random_seed,
        )
        for split in splits
    }
    test = rows.get("test", ())
    judgements = judge(test, rows.get("development", ()), baseline)
    notes = notes_on(test, judgements, baseline, left_out, milestones, rise)
    return Verdict(baseline, rows, judgements, notes, left_out, milestones)


@dataclass(frozen=True)
class Measured:
    """A perplexity and its resamples [R], and bits per byte."""

    value: float
    resamples_R: torch.Tensor
    bits_per_byte: float


def _rows(
    results: Sequence[SplitResult],
    costs: Mapping[str, float | None],
    baseline: str,
    left_out: Mapping[str, str],
    random_seed: int,
) -> tuple[Row, ...]:
    measured: dict[str, dict[str, Measured]] = {system: {} for system in costs}
    for number, result in enumerate(results):
        # A seed of its own for each text: documents of different texts are drawn independently.
        for system, one in measure(result, random_seed + number).items():
            measured[system][result.text] = one
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
            cost,
            {text: cell(value, reference.get(text)) for text, value in measured[system].items()},
            {
                group: cell(
                    _mean(measured[system], texts), _mean(reference, texts) if texts[0] in reference else None
                )
                for group, texts in groups.items()
                if texts and all(text in measured[system] for text in texts)
            },
        )
        for system, cost in costs.items()
        for reference in [{} if system == baseline else {t: measured[baseline][t] for t in groups["all"]}]
    )


def measure(result: SplitResult, random_seed: int) -> dict[str, Measured]:
    """Every system on one split of one text."""
    logp_SUD = torch.stack(list(result.logp.values()))
    sums_SU, sizes_U = logp_SUD.sum(-1), result.sizes_UD.sum(-1)
    values_S = perplexity(sums_SU[:, TOKENS], sizes_U[TOKENS]).tolist()
    bits_S = bits_per_byte(sums_SU[:, BYTES], sizes_U[BYTES]).tolist()
    resamples_SR = resampled_perplexity(
        logp_SUD[:, TOKENS].contiguous(), result.sizes_UD[TOKENS], RESAMPLES, random_seed
    )
    return {
        system: Measured(value, resamples_R, bits)
        for system, value, resamples_R, bits in zip(result.logp, values_S, resamples_SR, bits_S, strict=True)
    }


def _mean(measured: Mapping[str, Measured], texts: Sequence[str]) -> Measured:
    """The mean of perplexities over texts, as the paper's tables take it; likewise of bits per byte."""
    found = [measured[text] for text in texts]
    return Measured(
        sum(one.value for one in found) / len(found),
        torch.stack([one.resamples_R for one in found]).mean(0),
        sum(one.bits_per_byte for one in found) / len(found),
    )


def cell(system: Measured, baseline: Measured | None = None) -> Cell:
    """The cell of a table."""
    if baseline is None:
        return Cell(system.value, interval(system.resamples_R), system.bits_per_byte)
    return Cell(
        system.value,
        interval(system.resamples_R),
        system.bits_per_byte,
        system.value / baseline.value - 1,
        interval(system.resamples_R / baseline.resamples_R - 1),
    )
