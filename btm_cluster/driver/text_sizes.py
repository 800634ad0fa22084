"""Tokens of each text of a plan, and the passes of its trainings over them.

Exact where the store has the text's token blocks; else estimated from the sizes of its files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.data.sizes import estimated_tokens
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.ledger import Ledger
from btm_cluster.plan import ReadingPlan
from btm_cluster.requests import ReadText

MOST_PASSES = 4.0
"""Above it, more passes over a text are worth little.

Source: Muennighoff et al., 2023, Scaling data-constrained language models: up to four passes are nearly as
good as new text, and then their worth falls off.
"""


@dataclass(frozen=True)
class TextSize:
    """The tokens of a text, by split; None where its size is not known, as of a data set on the hub."""

    name: str
    train: int | None
    held_out: int | None
    """Development and test text together."""
    is_estimate: bool


@dataclass(frozen=True)
class TextUse:
    """A domain's training text, and how many tokens of it its trainings take."""

    size: TextSize
    seed_tokens: int
    expert_tokens: int

    @property
    def seed_passes(self) -> float | None:
        """Times that the seed reads the text."""
        return _passes(self.seed_tokens, self.size)

    @property
    def expert_passes(self) -> float | None:
        """Times that the text's expert reads it, after the seed."""
        return _passes(self.expert_tokens, self.size)

    @property
    def passes(self) -> float | None:
        """Times that the text is read until its expert is trained."""
        return _passes(self.seed_tokens + self.expert_tokens, self.size)


def _passes(tokens: int, size: TextSize) -> float | None:
    return tokens / size.train if size.train else None


def text_sizes(prepared: PreparedPlan, reads: Mapping[str, ReadText], ledger: Ledger) -> tuple[TextSize, ...]:
    """The size of each text of the plan; `reads` are the requests that read them, by name."""
    return tuple(_stored(text, ledger) or _estimated(text, reads[text.name]) for text in prepared.texts)


def text_uses(prepared: PreparedPlan, sizes: Sequence[TextSize]) -> tuple[TextUse, ...]:
    """Passes of the plan's trainings over each domain.

    The seed reads founding domains, unless it is a pretrained model; each expert reads its own domain.
    """
    training, founders = prepared.plan.training, dict(prepared.founders)
    per_update = training.blocks_per_domain_update * training.block_tokens
    by_seed = 0 if prepared.pretrained is not None else training.seed_updates * per_update
    by_expert = (training.updates - training.seed_updates) * per_update
    by_name = {size.name: size for size in sizes}
    return tuple(
        TextUse(by_name[domain.name], by_seed if domain.name in founders else 0, by_expert)
        for domain in prepared.domains
    )


def too_many_passes(uses: Sequence[TextUse], updates: int) -> str:
    """A sentence on the domains that are read too often, and what would mend it; empty where none is."""
    often = [(use.passes, use) for use in uses if use.passes is not None and use.passes > MOST_PASSES]
    if not often:
        return ""
    most = max(passes for passes, _ in often)
    named = ", ".join(f"{use.size.name} {shown_passes(passes, use.size)}" for passes, use in often)
    return (
        f"texts are read more than {MOST_PASSES:g} times until their experts are trained ({named}), and "
        "repeated text teaches little: give them more text, or lower `training.updates` to "
        f"{max(1, int(updates * MOST_PASSES / most)):,}"
    )


def shown_passes(passes: float, size: TextSize) -> str:
    """A number of passes over a text, in words: ≈ before an estimate."""
    number = f"{passes:,.1f}" if passes >= 1 or not passes else f"{passes:.2g}"
    return f"{'≈' if size.is_estimate else ''}{number}"


def _stored(text: PreparedText, ledger: Ledger) -> TextSize | None:
    splits = ("development", "test") if text.is_target else ("train", "development", "test")
    refs = [(split, ref) for split in splits for ref in text.tokens[split]]
    found = ledger.find_all([ref for _, ref in refs])
    if not refs or None in found:
        return None
    tokens = dict.fromkeys(("train", "development", "test"), 0)
    for (split, _), one in zip(refs, found, strict=True):
        assert one is not None
        tokens[split] += int(one.facts["tokens"])
    return TextSize(text.name, tokens["train"], tokens["development"] + tokens["test"], is_estimate=False)


def _estimated(text: PreparedText, read: ReadText) -> TextSize:
    stamp, is_data_set = read.fingerprint, read.source.dataset is not None
    if is_data_set and not stamp["files"]:
        return TextSize(text.name, None, None, is_estimate=True)
    whole = estimated_tokens(stamp["files" if is_data_set else "text"])
    if text.is_target:
        given = 0 if is_data_set else estimated_tokens([*stamp["development"], *stamp["test"]])
        return TextSize(text.name, 0, whole + given, is_estimate=True)
    dealt = {split: share for split, share in _shares(read.reading).items() if not stamp.get(split)}
    given = sum(estimated_tokens(stamp.get(split, ())) for split in _shares(read.reading))
    held_out = round(whole * sum(dealt.values()))
    return TextSize(text.name, whole - held_out, held_out + given, is_estimate=True)


def _shares(reading: ReadingPlan) -> dict[str, float]:
    return {"development": reading.development_share, "test": reading.test_share}
