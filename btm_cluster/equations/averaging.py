"""Parameter averaging: the weights by which experts are averaged, and the average of one tensor.

Source: paper, section 3.2.
"""

from collections.abc import Sequence

import torch


def uniform_weights(experts: int) -> list[float]:
    """1/k each."""
    return [1.0 / experts] * experts


def argmax_weights(prior_E: torch.Tensor) -> list[float]:
    """One at the largest prior, zero elsewhere."""
    best = int(prior_E.argmax())
    return [1.0 if i == best else 0.0 for i in range(len(prior_E))]


def posterior_weights(prior_E: torch.Tensor, digits: int = 6) -> list[float]:
    """The target's prior, rounded so that the average's identity does not hang on the last bits of a fit."""
    rounded = [round(float(w), digits) for w in prior_E / prior_E.sum()]
    largest = max(range(len(rounded)), key=rounded.__getitem__)
    rounded[largest] = round(1.0 - sum(w for i, w in enumerate(rounded) if i != largest), digits)
    return rounded


def average_tensor(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ w_i θ_i of equally shaped tensors, summed in float32, in the dtype of the first."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float32)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float32), alpha=weight)
    return total.to(tensors[0].dtype)
