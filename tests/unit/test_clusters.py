"""Balanced k-means and distance weights against independent routes: an exact
assignment, sums in probability space."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from btm_cluster.equations.clusters import (
    balanced_kmeans,
    balancing_prices,
    choose,
    cluster_log_weights,
    log_weighted_mixture,
    mean_cost,
    squared_distances,
)


def clouds(sizes: list[int], spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around the corners of a simplex, and which corner each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    owner_D = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    corners_EF = torch.eye(len(sizes), 5, dtype=torch.float64)
    noise_DF = torch.randn(len(owner_D), 5, generator=generator, dtype=torch.float64)
    return corners_EF[owner_D] + spread * noise_DF, owner_D


def test_squared_distances_are_those_of_the_definition() -> None:
    points_DF, _ = clouds([4, 3], 0.5)
    centres_EF = points_DF[:3]
    expected = ((centres_EF[:, None] - points_DF[None]) ** 2).sum(-1)
    torch.testing.assert_close(squared_distances(points_DF, centres_EF), expected)


def test_prices_choose_as_the_best_assignment_with_equal_shares_does() -> None:
    # An exact solver, with every cluster written out as its places: within 1 % of its cost, and of its
    # shares.
    points_DF, _ = clouds([200, 70, 30], 0.3)
    squared_ED = squared_distances(points_DF, torch.eye(3, 5, dtype=torch.float64))
    rows, places = linear_sum_assignment(squared_ED.repeat_interleave(100, dim=0).T.numpy())
    best = float(squared_ED[places // 100, rows].mean())
    found_D = choose(squared_ED, balancing_prices(squared_ED, torch.zeros(3, dtype=torch.float64)))
    assert float(squared_ED.gather(0, found_D[None]).mean()) == pytest.approx(best, rel=0.01)
    assert torch.bincount(found_D).tolist() == pytest.approx([100] * 3, abs=3)
    assert torch.bincount(choose(squared_ED, torch.zeros(3)))[0] > 180, (
        "without prices the largest cloud keeps its points"
    )


def test_prices_do_not_hang_on_where_their_search_starts() -> None:
    points_DF, _ = clouds([60, 30, 10], 0.4)
    squared_ED = squared_distances(points_DF, torch.eye(3, 5, dtype=torch.float64))
    starts = [torch.zeros(3, dtype=torch.float64), torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)]
    one, other = (balancing_prices(squared_ED, start) for start in starts)
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert float(one.mean()) == pytest.approx(0, abs=1e-12)


def test_balanced_kmeans_finds_planted_clouds_again_from_bad_centres() -> None:
    points_DF, owner_D = clouds([100, 100, 100], 0.15)
    centres_EF, price_E = balanced_kmeans(points_DF, points_DF[[0, 1, 150]])
    found_D = choose(squared_distances(points_DF, centres_EF), price_E)
    assert torch.bincount(found_D).tolist() == [100] * 3
    assert len({(int(a), int(b)) for a, b in zip(found_D, owner_D, strict=True)}) == 3
    for centre_F, owner in zip(centres_EF, [int(owner_D[found_D == e][0]) for e in range(3)], strict=True):
        torch.testing.assert_close(centre_F, points_DF[owner_D == owner].mean(0))
    within = points_DF.view(3, 100, 5).var(1, correction=0).sum(1).mean()
    assert mean_cost(points_DF, centres_EF, price_E) == pytest.approx(float(within))


def test_equal_points_leave_a_cluster_empty_and_its_centre_finite() -> None:
    points_DF = torch.ones(10, 5, dtype=torch.float64)
    centres_EF, price_E = balanced_kmeans(points_DF, torch.eye(2, 5, dtype=torch.float64))
    assert centres_EF.isfinite().all()
    assert price_E.isfinite().all()


def test_weights_are_the_softmax_of_c_btm() -> None:
    squared_ED = torch.tensor([[0.2, 1.0], [0.5, 1.0]], dtype=torch.float64)
    weights_ED = cluster_log_weights(squared_ED, temperature=0.1).exp()
    near, far = math.exp(-2), math.exp(-5)
    assert weights_ED[:, 0].tolist() == pytest.approx([near / (near + far), far / (near + far)])
    assert weights_ED[:, 1].tolist() == pytest.approx([0.5, 0.5])
    cold_ED = cluster_log_weights(squared_ED, temperature=1e-4).exp()
    assert cold_ED[:, 0].tolist() == pytest.approx([1, 0])


def test_the_mixture_is_one_of_probabilities() -> None:
    rng = np.random.default_rng(0)
    p_EBT, w_EBT = rng.uniform(0.1, 1, (3, 2, 4)), rng.dirichlet([1] * 3, (2, 4)).transpose(2, 0, 1)
    found_BT = log_weighted_mixture(torch.from_numpy(p_EBT).log(), torch.from_numpy(w_EBT).log())
    np.testing.assert_allclose(found_BT.exp().numpy(), (p_EBT * w_EBT).sum(0))
