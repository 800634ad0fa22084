"""Clusters as domains: balanced k-means, and experts weighed by the distance of a context to their clusters.

    p(D=j | x_<t)    ∝ exp(-dist²(x_<t, centre_j) / T)                      c-BTM, arXiv 2303.14177, section 2

Balance is kept by prices: a document goes where dist² + price is smallest, and the prices are those at which
every cluster gets an even share of a sample. What is chosen then hangs on the document alone, so that a
stream is balanced too, in any order, and the same document always goes to the same cluster. D documents or
contexts, F features.
"""

import torch

SMOOTHING = 0.005
"""In units of dist², which for unit vectors lies between 0 and 4: how softly
documents choose while prices are sought."""
MOVED_SHARE = 1e-3
"""Share of documents that still changed clusters when k-means has come to its end."""


def squared_distances(points_DF: torch.Tensor, centres_EF: torch.Tensor) -> torch.Tensor:
    """The squared distance of each document to each centre: [E, D]."""
    products_ED = centres_EF @ points_DF.T
    return (points_DF.square().sum(1) - 2 * products_ED + centres_EF.square().sum(1)[:, None]).clamp_min(0)


def cluster_log_weights(squared_ED: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """log p(D=j | context) by distance alone: [E, D]. Source: c-BTM, equation 2."""
    return torch.log_softmax(-squared_ED / temperature, dim=0)


def log_weighted_mixture(logp_EBT: torch.Tensor, log_weight_EBT: torch.Tensor) -> torch.Tensor:
    """log p(x_t | x_<t) of an ensemble with given weights, a mixture in probability space: [B, T]."""
    return torch.logsumexp(log_weight_EBT + logp_EBT, dim=0)


def balancing_prices(
    squared_ED: torch.Tensor, start_E: torch.Tensor, smoothing: float = SMOOTHING
) -> torch.Tensor:
    """Prices at which every cluster gets the same number of documents, the choice
    being a little soft: [E], of mean 0.

    They are the dual variables of the optimal transport of documents to clusters, whose objective is concave.
    """
    clusters = len(squared_ED)
    price_E = start_E.clone()
    optimizer = torch.optim.LBFGS(
        [price_E],
        max_iter=100,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-3 / clusters,
        tolerance_change=0,
    )

    def loss() -> torch.Tensor:
        utility_ED = -(squared_ED + price_E[:, None]) / smoothing
        price_E.grad = 1 / clusters - torch.softmax(utility_ED, dim=0).mean(1)
        return smoothing * torch.logsumexp(utility_ED, dim=0).mean() + price_E.mean()

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return price_E - price_E.mean()


def balanced_kmeans(
    points_DF: torch.Tensor, centres_EF: torch.Tensor, iterations: int = 100
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means from given centres in which every cluster gets the same number of
    documents: centres [E, F] and prices [E].

    Lloyd's steps with the assignment replaced by the balanced one. A cluster that got no document, since
    equal documents cannot be told apart, keeps its centre.
    """
    price_E = balancing_prices(
        squared_distances(points_DF, centres_EF), points_DF.new_zeros(len(centres_EF)), 20 * SMOOTHING
    )
    before_D = torch.full((len(points_DF),), -1)
    for _ in range(iterations):
        squared_ED = squared_distances(points_DF, centres_EF)
        price_E = balancing_prices(squared_ED, price_E)
        chosen_D = choose(squared_ED, price_E)
        if (chosen_D != before_D).double().mean() <= MOVED_SHARE:
            break
        before_D = chosen_D
        count_E = torch.bincount(chosen_D, minlength=len(centres_EF))[:, None]
        sums_EF = torch.zeros_like(centres_EF).index_add_(0, chosen_D, points_DF)
        centres_EF = torch.where(count_E > 0, sums_EF / count_E.clamp_min(1), centres_EF)
    return centres_EF, price_E


def choose(squared_ED: torch.Tensor, price_E: torch.Tensor) -> torch.Tensor:
    """The cluster of each document: [D]."""
    return (squared_ED + price_E[:, None]).argmin(0)


def mean_cost(points_DF: torch.Tensor, centres_EF: torch.Tensor, price_E: torch.Tensor) -> float:
    """Mean squared distance of the documents to the centres of their clusters:
    what balanced k-means lowers."""
    squared_ED = squared_distances(points_DF, centres_EF)
    return float(squared_ED.gather(0, choose(squared_ED, price_E)[None]).mean())
