"""Steps of Newton's method towards a minimum: from the whole curvature, or, of many parameters, from its products
with directions.

Stretches S of tokens N and P parameters, as in mixture_likelihood.py: the E log-priors b, then log β.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LONGEST_STEP = 4.0
"""In any parameter: where the likelihood is nearly flat, its curvature promises too much."""
MOST_DIRECTIONS = 100
"""That a step from products is made of."""
FURTHER_SHARE = 0.3
"""A step ends once its last direction, times the number of all, promises less than this share of what they promise."""
OWN_DAMPING = 0.25
"""Damping of a parameter, in units of its own slope: where the likelihood is flat, it alone moves by four at most."""
LEAST_SIZE = 1e-9
"""Smallest curvature of all parameters together, in nats per token: those with less stay where they are."""


@dataclass(frozen=True)
class WholeCurvature:
    """The matrix, for steps by its eigenvalues."""

    matrix_PP: torch.Tensor
    pairs_S: Sequence[torch.Tensor] = ()
    """None are kept: they are in the matrix."""

    def step(self, gradient_P: torch.Tensor, moves: slice, damping: float) -> torch.Tensor:
        """A step of the parameters that move, with every curvature taken for positive: it leaves saddles."""
        values_P, vectors_PP = torch.linalg.eigh(self.matrix_PP[moves, moves])
        return _shortened(-vectors_PP @ ((vectors_PP.T @ gradient_P[moves]) / (values_P.abs() + damping)))


@dataclass(frozen=True)
class CurvatureProducts:
    """The curvature as sums over tokens, of which no matrix of all pairs of parameters is made:

    diag(gradient) - Σ_n (A_n B_nᵀ + B_n A_nᵀ) / 2   for the log-priors, with a border for log β.
    """

    pairs_S: Sequence[torch.Tensor]
    """[2, P, N]: A, which is w - r of each expert and then the mean of e, and B, the same of w + r."""
    gradient_P: torch.Tensor
    border_P: torch.Tensor
    """Added to the row and the column of log β."""
    size_P: torch.Tensor
    """A bound of each parameter's curvature, in whose units directions are sought."""
    weight: float
    """β, by which the mean of e is multiplied."""
    count: int
    """Tokens of all stretches."""

    def times(self, direction_P: torch.Tensor) -> torch.Tensor:
        """The curvature times a direction: [P]."""
        product_P, moved_P = torch.zeros_like(direction_P), direction_P.clone()
        moved_P[-1] *= self.weight
        for apart_PN, both_PN in self.pairs_S:
            product_P.addmv_(apart_PN, both_PN.T @ moved_P)
            product_P.addmv_(both_PN, apart_PN.T @ moved_P)
        product_P /= -2 * self.count
        product_P[-1] *= self.weight
        product_P[:-1] += self.gradient_P[:-1] * direction_P[:-1]
        product_P[-1] += self.border_P[:-1] @ direction_P[:-1]
        return product_P.add_(self.border_P * direction_P[-1])

    def step(self, gradient_P: torch.Tensor, moves: slice, damping: float) -> torch.Tensor:
        """A step of the parameters that move, nearly Newton's: by conjugate gradients, up to the first direction
        of negative curvature, which is taken for positive."""

        def times(direction_P: torch.Tensor) -> torch.Tensor:
            whole_P = torch.zeros_like(self.size_P)
            whole_P[moves] = direction_P
            return self.times(whole_P)[moves]

        gradient_P = gradient_P[moves]
        least = LEAST_SIZE / len(self.size_P)
        size_P = self.size_P[moves] + least
        added_P = damping * size_P + OWN_DAMPING * gradient_P.abs() + least
        step_P = _solve(lambda one_P: times(one_P) + added_P * one_P, -gradient_P, size_P)
        # Of many experts some are nearly flat. Where they alone go too far, they alone are held.
        held_P = step_P.clamp(-LONGEST_STEP, LONGEST_STEP)
        return min(_shortened(step_P), held_P, key=lambda one_P: float(gradient_P @ one_P))


def _solve(
    times: Callable[[torch.Tensor], torch.Tensor], downhill_P: torch.Tensor, size_P: torch.Tensor
) -> torch.Tensor:
    """A step that `times` takes nearly to `downhill_P`: [P]."""
    step_P, left_P = torch.zeros_like(downhill_P), downhill_P
    scaled_P = left_P / size_P
    direction_P, squared, promised = scaled_P, float(left_P @ scaled_P), 0.0
    for number in range(1, MOST_DIRECTIONS + 1):
        if squared <= 0:
            break
        bent_P = times(direction_P)
        bend = float(direction_P @ bent_P)
        if bend <= 0:
            farthest = LONGEST_STEP / float(direction_P.abs().max())
            return step_P + (min(farthest, squared / -bend) if bend else farthest) * direction_P
        length = squared / bend
        step_P = step_P + length * direction_P
        promised += length * squared
        if number * length * squared < FURTHER_SHARE * promised:
            break
        left_P = left_P - length * bent_P
        scaled_P = left_P / size_P
        before, squared = squared, float(left_P @ scaled_P)
        direction_P = scaled_P + squared / before * direction_P
    return step_P


def _shortened(step_P: torch.Tensor) -> torch.Tensor:
    return step_P * min(1.0, LONGEST_STEP / max(float(step_P.abs().max()), 1e-12))
