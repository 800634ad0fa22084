"""The curve of a training, as it is stored with the model: values, the updates at which they are taken, and their file.

Which updates these are is a function of the plan's number of updates alone. So a seed has one curve whether it
was trained by itself or on the Transformer-LM's way. Knows no tensors and no store.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from statistics import fmean
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

CURVE_FILE = "curve.json"
MOST_POINTS = 500
"""Most points of a whole training, beside ends and milestones."""
DEVELOPMENT_POINTS = 8
"""Points of a whole training, seed and expert together: 4 of each at a seed share of a half. Starts and ends come on
top."""
MOST_DEVELOPMENT_BLOCKS = 64
"""Most development blocks of each text at each of these points."""
DEVELOPMENT_SHARE = 0.0025
"""Share of a training's arithmetic. Passes are not compiled: on a GPU they take several times that share of time.
At 0.01, with 3.2M parameters on an H200, it was 18 % of a seed's seconds (once, on 29 November 2026)."""
DIGITS = 6
"""Significant ones that are kept of each value."""
RISE_POINTS = 5
"""Fewest points whose mean loss is compared; a curve has four times as many."""
LEAST_RISE = 0.1
"""Nats per token: a tenth of perplexity."""
RISE_ERRORS = 5
"""A rise is that many standard errors at least. The lowest of many means is below the true one by up to two."""

Count = Annotated[int, Field(ge=0)]


class _Points(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    updates: list[Count] = []
    """Updates made when the values were taken, rising."""
    loss: list[FiniteFloat] = []
    """Nats per token."""

    @model_validator(mode="after")
    def _are_points(self) -> Self:
        lists = {name: value for name, value in self if isinstance(value, list)}
        if len({len(values) for values in lists.values()}) > 1:
            raise ValueError(
                f"lists of different lengths: {', '.join(f'{n} {len(v)}' for n, v in lists.items())}"
            )
        if any(after <= before for before, after in zip(self.updates, self.updates[1:], strict=False)):
            raise ValueError("updates that do not rise")
        return self


class DevelopmentCurve(_Points):
    """Loss on the first development blocks of what a model is trained on."""


@dataclass(frozen=True)
class Rise:
    """A training whose loss, in nats per token, ended higher than it had been."""

    lowest: float
    at: int
    """The update up to which it was lowest."""
    last: float

    @property
    def sentence(self) -> str:
        """To be continued after the training's name."""
        return f"training loss rose from {self.lowest:.2f} around update {self.at:,} to {self.last:.2f} at the end"


class Curve(_Points):
    """Points of a training: what each update reported, in order. A point that was not finite is left out."""

    learning_rate: list[FiniteFloat] = []
    gradient_norm: list[FiniteFloat] = []
    """Over the whole model, before clipping."""
    tokens: list[Count] = []
    """Trained on so far, from this training's own first update on."""
    development: DevelopmentCurve = DevelopmentCurve()

    def ending_at(self, last_update: int, first_update: int, updates: int, blocks_per_update: int) -> Self:
        """The curve of the model that this training is at `last_update`, without the ends of others that it passed."""
        keeps = [is_recorded(update, updates, (last_update,)) for update in self.updates]
        lists = {name: list(compress(value, keeps)) for name, value in self if isinstance(value, list)}
        points, _ = development_size(updates, blocks_per_update)
        looks = {first_update, *development_updates(updates, points), last_update}
        kept = [
            (u, loss)
            for u, loss in zip(self.development.updates, self.development.loss, strict=True)
            if u in looks
        ]
        development = DevelopmentCurve(updates=[u for u, _ in kept], loss=[loss for _, loss in kept])
        return type(self)(**lists, development=development)

    def rise(self) -> Rise | None:
        """By how much the loss ended above its lowest, if by more than noise: the means of a tenth of the points."""
        width = max(RISE_POINTS, len(self.loss) // 10)
        if len(self.loss) < 4 * width:
            return None
        windows = [self.loss[end - width : end] for end in range(width, len(self.loss) + 1)]
        last, lowest = windows[-1], min(windows, key=fmean)
        rise = fmean(last) - fmean(lowest)
        # Noise by the steps between points, of which each has that of two; and so has the rise that of two means.
        error = math.sqrt(fmean((after - before) ** 2 for before, after in pairwise(self.loss)) / width)
        if rise < max(LEAST_RISE, RISE_ERRORS * error):
            return None
        return Rise(fmean(lowest), self.updates[windows.index(lowest) + width - 1], fmean(last))


def is_recorded(update: int, updates: int, ends: Collection[int]) -> bool:
    """Whether a curve has a point after `update` updates of a plan of so many; `ends` are where models end."""
    return update in ends or update % -(-updates // MOST_POINTS) == 0


def development_size(updates: int, blocks_per_update: int) -> tuple[int, int]:
    """How often development loss is taken in a whole training, and on how many blocks of each text.

    `blocks_per_update` are those of each text. A forward pass is a third of the arithmetic of an update.
    """
    passes = int(3 * DEVELOPMENT_SHARE * updates * blocks_per_update)
    points = min(DEVELOPMENT_POINTS, passes)
    return points, min(MOST_DEVELOPMENT_BLOCKS, passes // points) if points else 1


def development_updates(updates: int, points: int) -> range:
    """Updates of a plan of so many after which development loss is taken, beside starts and ends."""
    every = -(-updates // points) if points else updates + 1
    return range(every, updates + 1, every)


def rounded(value: float) -> float:
    """A value as a curve keeps it."""
    return float(f"{value:.{DIGITS}g}")


def are_finite(values: Sequence[float]) -> bool:
    """Whether a curve can keep all of these."""
    return all(map(math.isfinite, values))
