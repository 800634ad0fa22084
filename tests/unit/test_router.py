"""The closed form of routers, against least squares and a search by trial."""

import numpy as np
import pytest
import torch

from btm_cluster.equations.router import MOST_SHARPNESS, RIDGE, best_sharpness, ridge_router


def test_a_ridge_regression_is_least_squares_with_a_row_of_penalty_for_each_dimension() -> None:
    rng = np.random.default_rng(0)
    hidden, one_hot = rng.normal(size=(40, 5)), np.eye(3)[rng.integers(3, size=40)]
    weights = rng.uniform(0.5, 2, size=40)
    gram = torch.from_numpy((hidden * weights[:, None]).T @ hidden)
    sums = torch.from_numpy((one_hot * weights[:, None]).T @ hidden)
    penalty = RIDGE * float(gram.diagonal().mean())
    rows = np.sqrt(weights)[:, None]
    augmented = np.vstack([rows * hidden, np.sqrt(penalty) * np.eye(5)])
    expected = np.linalg.lstsq(augmented, np.vstack([rows * one_hot, np.zeros((5, 3))]), rcond=None)[0]
    np.testing.assert_allclose(ridge_router(gram, sums).numpy(), expected.T, atol=1e-12)


def test_the_sharpness_is_where_the_likelihood_is_highest() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_N = torch.randint(3, (200,), generator=generator)
    noise_NE = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    scores_NE = 0.1 * torch.nn.functional.one_hot(experts_N, 3) + 0.1 * noise_NE
    weights_N = torch.rand(200, generator=generator, dtype=torch.float64)

    def likelihood(sharpness: float) -> float:
        logp_NE = torch.log_softmax(sharpness * scores_NE, 1)
        return float((weights_N * logp_NE[torch.arange(200), experts_N]).sum())

    found = best_sharpness(scores_NE, experts_N, weights_N)
    tried = max((step / 100 for step in range(1, 5_000)), key=likelihood)
    assert found == pytest.approx(tried, abs=0.01)


def test_scores_that_tell_all_apart_or_nothing_get_a_bounded_sharpness() -> None:
    experts_N, weights_N = torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64)
    right_NE = torch.eye(2, dtype=torch.float64)
    assert best_sharpness(right_NE, experts_N, weights_N) == MOST_SHARPNESS
    assert best_sharpness(-right_NE, experts_N, weights_N) == 1
