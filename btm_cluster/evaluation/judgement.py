"""The judgement of a verdict's rows: whether the best ensemble, the best single model and the mixture of
experts of a forest are worth it, and what a reader should know besides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from btm_cluster.curve import Rise
from btm_cluster.evaluation.rows import (
    SINGLE_MODELS,
    Milestones,
    Row,
    cost_text,
    is_ensemble,
    is_mixture_of_experts,
    system_of_texts,
)

Kind: TypeAlias = Literal["ensemble", "single model", "mixture of experts"]
"""The kinds of a forest's systems; the best of each is judged."""
ADDED_LATER = "added later"
"""Why a domain is left out of the comparison that the forest got after its founding."""


@dataclass(frozen=True)
class Judgement:
    """Whether a system is worth it: its mean perplexity on test text against the baseline's."""

    kind: Kind
    system: str
    """The best of its kind, by development text where there is any."""
    baseline: str
    perplexity: float
    difference: float
    """Relative."""
    interval: tuple[float, float]
    """The difference's, at 95 %."""
    texts: int
    """On how many it was compared."""
    no_better_on: tuple[str, ...]
    inference_cost: float | None
    """Forward passes for a token, by parameters."""

    @property
    def outcome(self) -> Literal["worth it", "not worth it", "undecided"]:
        """By whether the whole interval is below or above 0."""
        low, high = self.interval
        return "worth it" if high < 0 else "not worth it" if low > 0 else "undecided"

    @property
    def sentence(self) -> str:
        """All of it in words, the outcome first."""
        article = "an" if self.kind == "ensemble" else "a"
        low, high = self.interval
        cost = None if self.inference_cost is None else cost_text(self.inference_cost)
        priced = "" if cost is None else f", at {'' if cost == '1' else f'{cost} times '}its inference cost"
        where = f" No better on: {', '.join(self.no_better_on)}." if self.no_better_on else ""
        return (
            f"{self.outcome.capitalize()} as {article} {self.kind}: {self.difference:+.1%} perplexity "
            f"(95 % interval {low:+.1%} to {high:+.1%}) against the {self.baseline} on "
            f"{self.texts} test text{'s' * (self.texts > 1)}{priced} ({system_of_texts(self.system)}).{where}"
        )


def judge(test: Sequence[Row], development: Sequence[Row], baseline: str) -> tuple[Judgement, ...]:
    """A judgement of the best system of each kind, as far as there are any to compare."""
    kinds: Mapping[Kind, Callable[[str], bool]] = {
        "ensemble": is_ensemble,
        "single model": SINGLE_MODELS.__contains__,
        "mixture of experts": is_mixture_of_experts,
    }
    found = []
    for kind, is_of_kind in kinds.items():
        rows = {row.system: row for row in test if is_of_kind(row.system) and "all" in row.means}
        if rows:
            found.append(_judgement(kind, _best(rows, development), baseline))
    return tuple(found)


def _best(rows: Mapping[str, Row], development: Sequence[Row]) -> Row:
    """The one with the lowest perplexity on development text; on test text, where some have no other."""
    chosen_by = {row.system: row for row in development if row.system in rows and "all" in row.means}
    if chosen_by.keys() != rows.keys():
        chosen_by = dict(rows)
    return rows[min(chosen_by, key=lambda system: chosen_by[system].means["all"].perplexity)]


def _judgement(kind: Kind, row: Row, baseline: str) -> Judgement:
    mean = row.means["all"]
    assert mean.difference is not None
    assert mean.difference_interval is not None
    compared = {text: cell.difference for text, cell in row.cells.items() if cell.difference is not None}
    return Judgement(
        kind,
        row.system,
        baseline,
        mean.perplexity,
        mean.difference,
        mean.difference_interval,
        len(compared),
        tuple(text for text, difference in compared.items() if difference >= 0),
        row.inference_cost,
    )


def notes_on(
    test: Sequence[Row],
    judgements: Sequence[Judgement],
    baseline: str,
    left_out: Mapping[str, str],
    milestones: Milestones | None,
    rise: Rise | None,
) -> tuple[str, ...]:
    """Notes on a missing judgement, on which Transformer-LM is the baseline and how it trained, and on texts left
    out."""
    return tuple(_notes(test, judgements, baseline, left_out, milestones, rise))


def _notes(
    test: Sequence[Row],
    judgements: Sequence[Judgement],
    baseline: str,
    left_out: Mapping[str, str],
    milestones: Milestones | None,
    rise: Rise | None,
) -> Iterator[str]:
    if not judgements:
        yield f"The forest is not compared with the {baseline}: there is no test text to compare them on."
    elif milestones:
        yield _which_milestone(milestones)
    if rise:
        yield f"The comparison may flatter the forest: the Transformer-LM's {rise.sentence}. Lower its learning rate."
    if not left_out:
        return
    reasons = {reason: [t for t, why in left_out.items() if why == reason] for reason in left_out.values()}
    listed = "; ".join(f"{', '.join(texts)} ({reason})" for reason, texts in reasons.items())
    yield f"Not compared on, since only one side learned from it: {listed}."
    if added := reasons.get(ADDED_LATER):
        yield f"The {baseline} never saw {', '.join(added)}."
        if any("targets" in row.means for row in test):
            yield f"On targets the forest has more training than the {baseline}: that of what was added later."


def _which_milestone(milestones: Milestones) -> str:
    updates = [f"{update:,}" for update in sorted(milestones.perplexities)]
    of_all = (
        f"of updates {', '.join(updates[:-1])} and {updates[-1]} it has the lowest perplexity on the founding "
        "domains' development text."
    )
    which = "finished one" if milestones.is_finished_best else f"one at update {milestones.best:,}"
    return f"That Transformer-LM is the {which}: {of_all}"
