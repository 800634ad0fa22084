"""The curve of a training in the making.

Values stay on the device until somebody asks for the curve, which waits for them; noting them does not.
"""

import torch

from btm_cluster.curve import Curve, DevelopmentCurve, are_finite, rounded


class Recording:
    """Points noted so far: a few hundred at most, each a handful of numbers on the device."""

    def __init__(self, curve: Curve | None = None) -> None:
        self._curve = curve or Curve()
        self._fresh: list[tuple[int, int, float, torch.Tensor]] = []
        self._fresh_development: list[tuple[int, torch.Tensor]] = []

    def note(
        self, update: int, tokens: int, learning_rate: float, loss: torch.Tensor, gradient_norm: torch.Tensor
    ) -> None:
        """Adds the point of an update."""
        self._fresh.append(
            (update, tokens, learning_rate, torch.stack([loss.detach(), gradient_norm.detach()]))
        )

    def note_development(self, update: int, loss: torch.Tensor) -> None:
        """Adds the development loss at an update."""
        self._fresh_development.append((update, loss))

    def curve(self) -> Curve:
        """All points until now."""
        if self._fresh:
            self._curve = self._with_fresh()
            self._fresh = []
        self._add_development()
        return self._curve

    def newest_development(self) -> tuple[int, float] | None:
        """The update at which the newest development loss was taken, and that loss; waits for no other point."""
        self._add_development()
        looks = self._curve.development
        return (looks.updates[-1], looks.loss[-1]) if looks.updates else None

    def _add_development(self) -> None:
        if not self._fresh_development:
            return
        before = self._curve.development
        losses = torch.stack([one for _, one in self._fresh_development]).tolist()
        looks = [
            (update, rounded(loss))
            for (update, _), loss in zip(self._fresh_development, losses, strict=True)
            if are_finite((loss,))
        ]
        development = DevelopmentCurve(
            updates=[*before.updates, *(one[0] for one in looks)],
            loss=[*before.loss, *(one[1] for one in looks)],
        )
        self._curve = self._curve.model_copy(update={"development": development})
        self._fresh_development = []

    def _with_fresh(self) -> Curve:
        before = self._curve
        values = torch.stack([pair for *_, pair in self._fresh]).tolist()
        points = [
            (update, tokens, rounded(rate), rounded(loss), rounded(norm))
            for (update, tokens, rate, _), (loss, norm) in zip(self._fresh, values, strict=True)
            if are_finite((loss, norm))
        ]
        return Curve(
            updates=[*before.updates, *(one[0] for one in points)],
            tokens=[*before.tokens, *(one[1] for one in points)],
            learning_rate=[*before.learning_rate, *(one[2] for one in points)],
            loss=[*before.loss, *(one[3] for one in points)],
            gradient_norm=[*before.gradient_norm, *(one[4] for one in points)],
            development=before.development,
        )
