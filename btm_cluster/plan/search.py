"""The section of a plan for a study's search: a space of recipes, and the rule that stops those which lose early."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from btm_cluster.plan.broken_rules import Broken, Given, entries_of, exactly_one, field_of, is_given
from btm_cluster.plan.section import Section
from btm_cluster.plan.values import Positive, PositiveReal, Share, Whole

_DRAWN = ("uniform", "loguniform")
_KINDS = ("grid", *_DRAWN)
NEAR_END = 0.95
"""Share of a training from which on there is no rung but its end: a stop there would spare next to nothing."""


def _space_rules(given: Given) -> Iterator[Broken]:
    """One kind of space, and bounds that hold something between them."""
    yield from exactly_one(given, _KINDS, "write one")
    yield from _grid_rules(given)
    for kind in _DRAWN:
        bounds = entries_of(given.get(kind))
        if len(bounds) == 2 and not _is_below(*bounds):
            found, expected = f"{bounds[0]!r} to {bounds[1]!r}", "a lower bound and a higher one"
            yield Broken(kind, found, expected, "change one of them")


def _grid_rules(given: Given) -> Iterator[Broken]:
    """Nothing is tried twice."""
    for value, count in Counter(map(str, entries_of(given.get("grid")))).items():
        if count > 1:
            yield Broken("grid", f"{value} {count} times", "each once", "write it once")


def _is_below(lowest: Any, highest: Any) -> bool:
    try:
        return float(lowest) < float(highest)
    except (TypeError, ValueError):  # no numbers, which the field itself says
        return True


def _search_rules(given: Given) -> Iterator[Broken]:
    """Something is searched, and nothing is tried twice."""
    rate, blocks = given.get("learning_rate"), given.get("blocks_per_domain_update")
    if not is_given(rate) and not is_given(blocks):
        expected = "`learning_rate` or `blocks_per_domain_update`, or both"
        yield Broken("", "no setting", expected, "give one of them a space of values")
    is_drawn = any(is_given(field_of(rate, kind)) for kind in _DRAWN)
    if not is_drawn and given.get("samples", 1) != 1:
        expected = "nothing, since a grid alone gives the same recipes again"
        yield Broken("samples", repr(given["samples"]), expected, "leave it out, or draw the learning rate")


class RateSpace(Section):
    """Values of a learning rate, by one of Ray Tune's kinds of search space."""

    rules: ClassVar = _space_rules
    grid: Annotated[tuple[PositiveReal, ...], Field(min_length=1)] | None = None
    """Each of these."""
    uniform: tuple[PositiveReal, PositiveReal] | None = None
    """Drawn evenly between two bounds."""
    loguniform: tuple[PositiveReal, PositiveReal] | None = None
    """Drawn evenly between two bounds on a logarithmic scale, as learning rates are."""


class BlocksSpace(Section):
    """Numbers of blocks."""

    rules: ClassVar = _grid_rules
    grid: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Each of these."""


class SearchPlan(Section):
    """A search for the recipe of a study's Transformer-LM by Ray Tune, which stops recipes that lose early with
    its asynchronous successive halving (ASHA). Trials that reach the end compete as those of `trials` do.

    Source: Li et al., 2020, A System for Massively Parallel Hyperparameter Tuning.
    """

    rules: ClassVar = _search_rules
    learning_rate: RateSpace | None = None
    """Peak of the schedule; without it, the size's own."""
    blocks_per_domain_update: BlocksSpace | None = None
    """Blocks of each domain in an update; `updates` follow, so that the compute stays the same. Without it, the
    size's own."""
    samples: Positive = 1
    """Draws at each point of the grid."""
    at_once: Positive = 8
    """Trials under way at a time: each trains to its next rung before one is judged. What is stopped depends on
    it, so it is not the number that the cluster can hold, which may be smaller or larger."""
    first_rung: Annotated[Share, Field(gt=0)] = 0.125
    """Share of the training after which a trial can be stopped first: after the warm-up."""
    reduction_factor: Annotated[Positive, Field(ge=2)] = 3
    """About one in this many trials continues beyond a rung; each rung is this many times further than the one
    before."""
    random_seed: Annotated[Whole, Field(lt=2**32)] = 0
    """The random seed of what is drawn."""

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the training at which a trial is measured, the last at its end, with no other near it."""
        shares, share = [], self.first_rung
        while share < NEAR_END:
            shares.append(share)
            share = self.first_rung * self.reduction_factor ** len(shares)
        return (*shares, 1.0)

    @property
    def trials(self) -> int:
        """How many recipes are tried."""
        rates = self.learning_rate.grid if self.learning_rate else None
        blocks = self.blocks_per_domain_update
        return self.samples * len(rates or (None,)) * len(blocks.grid if blocks else (None,))
