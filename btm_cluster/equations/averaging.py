"""Parameter averaging: the weights by which experts are averaged.

Source: paper, section 3.2.
"""

from collections.abc import Callable, Sequence

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


def greedy_weights(loss: Callable[[Sequence[float]], float], experts: int) -> tuple[list[float], float]:
    """The uniform average over a greedily grown set of experts, and its loss. `loss` judges any weights.

    Experts come by their own loss, best first; each stays where the average gets better with it.
    Source: Wortsman et al., Model soups, 2022, recipe 1.
    """
    alone = [loss([float(i == j) for i in range(experts)]) for j in range(experts)]
    order = sorted(range(experts), key=alone.__getitem__)
    kept, best = order[:1], alone[order[0]]
    for j in order[1:]:
        tried = loss([float(i in (*kept, j)) / (len(kept) + 1) for i in range(experts)])
        if tried < best:
            kept, best = [*kept, j], tried
    return [float(i in kept) / len(kept) for i in range(experts)], best


def same_in_all(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that all of these are.

    Raises:
        ValueError: they differ.
    """
    if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        raise ValueError("whole numbers that differ")
    return tensors[0]
