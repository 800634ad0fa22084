"""Merging by task vectors, one tensor at a time: τ_i = θ_i − θ_0, the difference of an expert to the seed θ_0
that it branched from.

Whole numbers and switches have no difference: they must be the same in all.
"""

from collections.abc import Sequence

import torch

from btm_cluster.equations.averaging import same_in_all

TASK_ARITHMETIC_SCALE = 0.4
"""λ where no validation text chooses it. Source: Ilharco et al. tune λ and find 0.3 to 0.5 good for sums;
Yadav et al., 2023, take 0.4 from there."""
TIES_SCALE = 1.0
"""λ where no validation text chooses it. Source: Yadav et al., 2023."""
TIES_DENSITY = 0.2
"""Share of the differences that is kept where no validation text chooses it. Source: Yadav et al., 2023."""


def task_arithmetic(base: torch.Tensor, tensors: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """θ_0 + λ Σ_i τ_i, summed in float32, in the dtype of `base`.

    Source: Ilharco et al., Editing Models with Task Arithmetic, 2022 (arXiv 2212.04089).

    Raises:
        ValueError: whole numbers that differ.
    """
    if not base.is_floating_point():
        return same_in_all([base, *tensors])
    start = base.to(torch.float32)
    total = torch.zeros_like(start)
    for tensor in tensors:
        total += tensor.to(torch.float32) - start
    return (start + scale * total).to(base.dtype)


def ties(base: torch.Tensor, tensors: Sequence[torch.Tensor], density: float, scale: float) -> torch.Tensor:
    """θ_0 + λ τ, where τ is the mean of the trimmed τ_i that have the elected sign; in float32, in the dtype
    of `base`.

    Trim: of each τ_i the entries of largest magnitude stay, `density` of this tensor. Elect: at each place
    the sign of Σ_i τ_i, plus where that is zero. Merge: the mean over the entries of that sign which stayed.
    Source: Yadav et al., TIES-Merging, 2023 (arXiv 2306.01708), where a whole model is trimmed at once.

    Raises:
        ValueError: whole numbers that differ.
    """
    if not base.is_floating_point():
        return same_in_all([base, *tensors])
    start = base.to(torch.float32)
    total, positive, negative = (torch.zeros_like(start) for _ in range(3))
    positives, negatives = (torch.zeros(start.shape, dtype=torch.int32) for _ in range(2))
    for tensor in tensors:
        difference = trim(tensor.to(torch.float32) - start, density)
        total += difference
        positive += difference.clamp(min=0)
        negative += difference.clamp(max=0)
        positives += difference > 0
        negatives += difference < 0
    is_positive = total >= 0
    agreed = torch.where(is_positive, positive, negative)
    number = torch.where(is_positive, positives, negatives).clamp(min=1)
    return (start + scale * agreed / number).to(base.dtype)


def trim(difference: torch.Tensor, density: float) -> torch.Tensor:
    """A difference with all but its largest entries at zero: `density` of them stay, rounded down, at least
    one, and whatever is as large as the smallest that stays."""
    entries = difference.numel()
    kept = max(1, int(density * entries))
    if kept >= entries:
        return difference
    magnitude = difference.abs()
    smallest = magnitude.flatten().kthvalue(entries - kept + 1).values
    return torch.where(magnitude >= smallest, difference, 0.0)
