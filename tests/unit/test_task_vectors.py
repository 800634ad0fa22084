"""TIES-Merging and task arithmetic against the papers' equations, written out in float64 place by place."""

import math

import pytest
import torch

from btm_cluster.equations.task_vectors import task_arithmetic, ties, trim

SHAPES = [(), (1,), (0, 3), (7,), (33, 65), (3, 5, 7)]


def drawn(shape: tuple[int, ...], number: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A seed and its experts."""
    generator = torch.Generator().manual_seed(number)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(number)]
    return [one.to(dtype) for one in (base, *experts)]


def written_out(
    base: torch.Tensor, experts: list[torch.Tensor], density: float, scale: float
) -> torch.Tensor:
    """Algorithm 1 of Yadav et al.: each step as it stands there, with Python's numbers."""
    start = base.flatten().tolist()
    vectors = [
        [value - first for value, first in zip(expert.flatten().tolist(), start, strict=True)]
        for expert in experts
    ]
    trimmed = []
    for vector in vectors:
        kept = sorted(range(len(vector)), key=lambda p: -abs(vector[p]))[: max(1, int(density * len(vector)))]
        trimmed.append([value if place in kept else 0.0 for place, value in enumerate(vector)])
    merged = []
    for place, first in enumerate(start):
        values = [vector[place] for vector in trimmed]
        sign = 1 if math.fsum(values) >= 0 else -1
        agreed = [value for value in values if value * sign > 0]
        merged.append(first + scale * (math.fsum(agreed) / len(agreed) if agreed else 0.0))
    return torch.tensor(merged, dtype=torch.float64).view(base.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("density", "scale"), [(0.2, 1.0), (0.5, 0.7), (1.0, -1.0), (0.001, 2.0)])
def test_ties_is_the_papers_algorithm(shape: tuple[int, ...], density: float, scale: float) -> None:
    for number in (1, 2, 5):
        base, *experts = drawn(shape, number)
        found = ties(base, experts, density, scale)
        assert found.dtype == base.dtype
        torch.testing.assert_close(
            found.double(), written_out(base, experts, density, scale), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_task_arithmetic_adds_the_scaled_sum_of_task_vectors(shape: tuple[int, ...]) -> None:
    for number in (1, 2, 5):
        base, *experts = drawn(shape, number)
        start = base.double()
        exact = start + 0.4 * sum(((expert.double() - start) for expert in experts), torch.zeros_like(start))
        torch.testing.assert_close(task_arithmetic(base, experts, 0.4).double(), exact, rtol=0, atol=2e-6)


def test_experts_that_agree_are_averaged_and_those_outvoted_are_left_out() -> None:
    base = torch.zeros(4)
    experts = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([1.0, -4.0, -3.0, 0.0])]
    assert ties(base, experts, 1.0, 1.0).tolist() == [2.0, -4.0, -2.0, 0.0]
    assert task_arithmetic(base, experts, 1.0).tolist() == [4.0, -3.0, -4.0, 0.0]


def test_trimming_keeps_the_largest_whatever_their_sign() -> None:
    difference = torch.tensor([0.1, -5.0, 3.0, -0.2, 4.0])
    assert trim(difference, 0.4).tolist() == [0.0, -5.0, 0.0, 0.0, 4.0]
    assert trim(difference, 0.01).tolist() == [0.0, -5.0, 0.0, 0.0, 0.0], "one stays"
    assert trim(torch.tensor([1.0, -1.0, 0.5]), 0.34).tolist() == [1.0, -1.0, 0.0], "equal ones stay together"


def test_half_precision_is_merged_in_float32() -> None:
    # Summed in bfloat16, 2^-7 is lost beside 2 after the first 256 of these experts.
    base = torch.ones(8, dtype=torch.bfloat16)
    experts = [torch.full((8,), 1 + 2**-7, dtype=torch.bfloat16)] * 512
    assert task_arithmetic(base, experts, 1 / 512).tolist() == [1 + 2**-7] * 8
    assert task_arithmetic(base, experts, 1 / 512).dtype == torch.bfloat16
    assert ties(base, experts, 1.0, 1.0).tolist() == [1 + 2**-7] * 8


def test_whole_numbers_must_be_the_same_in_all() -> None:
    one, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert ties(one, [one], 0.2, 1.0) is one
    for merged in (lambda: ties(one, [one, other], 0.2, 1.0), lambda: task_arithmetic(one, [other], 1.0)):
        with pytest.raises(ValueError, match="whole numbers that differ"):
            merged()
