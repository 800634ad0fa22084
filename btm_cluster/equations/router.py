"""The router of one layer of a mixture of experts, in closed form: a linear map from hidden states to experts.

x_t is the hidden state that the layer's feed-forwards read at token t, y_t the one-hot vector of the expert
whose domain the token is from. N is tokens, H the hidden width, E experts.
"""

import torch

RIDGE = 0.001
"""λ by the mean of the Gram matrix's diagonal: accuracies fall above it, and hardly change below."""
MOST_SHARPNESS = 100.0
"""β where held-out tokens are told apart without an error: larger ones change no weight."""
_HALVINGS = 40


def ridge_router(gram_HH: torch.Tensor, sums_EH: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """W [E, H] that minimises Σ_t w_t |W x_t − y_t|² + λ |W|²: W = S (G + λ I)⁻¹, in float64.

    G = Σ_t w_t x_t x_tᵀ, S = Σ_t w_t y_t x_tᵀ, and λ = `ridge` · tr(G) / H. Targets y_t that are shifted by the
    same for all experts give the same routing, so that they are not centred. No intercept: routers of stock
    architectures have none. Source: Hoerl and Kennard, Ridge Regression, 1970.
    """
    penalty = ridge * gram_HH.diagonal().mean()
    regular_HH = gram_HH + penalty * torch.eye(len(gram_HH), dtype=gram_HH.dtype, device=gram_HH.device)
    weights_HE: torch.Tensor = torch.linalg.solve(regular_HH, sums_EH.T)
    return weights_HE.T


def best_sharpness(scores_NE: torch.Tensor, experts_N: torch.Tensor, weights_N: torch.Tensor) -> float:
    """β ≥ 0 that maximises Σ_t w_t log softmax(β s_t) at the token's expert, s_t = W x_t: the inverse
    temperature of the router, whose weights are then β W.

    A regression's outputs lie between 0 and 1, so that their softmax is nearly uniform. The sum is concave in
    β; its slope's zero is found by halving. 1 where no β > 0 is better than weighing all experts alike, and
    MOST_SHARPNESS at most. Source: Guo et al., On Calibration of Modern Neural Networks, 2017, section 4.2.
    """
    own_N = scores_NE.gather(1, experts_N[:, None])[:, 0]

    def slope(sharpness: float) -> float:
        expected_N = (torch.softmax(sharpness * scores_NE, dim=1) * scores_NE).sum(1)
        return float((weights_N * (own_N - expected_N)).sum())

    low, high = 0.0, MOST_SHARPNESS
    if slope(low) <= 0:
        return 1.0
    if slope(high) >= 0:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2
