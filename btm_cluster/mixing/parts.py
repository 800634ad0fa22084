"""Each expert's part in an ensemble on a text: its weight, the rise without it, and ensembles of fewer experts.

Arithmetic on stored scores, in bounded memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from btm_cluster.equations.contribution import leave_one_out
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.perplexity import perplexity
from btm_cluster.equations.posterior import Posterior, keep_top, log_posterior
from btm_cluster.mixing.scores import BLOCKS_AT_ONCE, ScoreStack


@dataclass(frozen=True)
class Parts:
    """An ensemble on a text. Lists are in the order of experts [E]."""

    perplexity: float
    alone: tuple[float, ...]
    """Perplexity of each expert by itself."""
    weights: tuple[float, ...]
    """Mean over tokens of p(D=j | x_<t)."""
    without: tuple[float, ...]
    """Perplexity without each expert; empty for one expert."""
    of_top: tuple[float, ...]
    """Perplexity of the experts with the largest prior alone, for each number of them that was asked for."""
    tokens: int


def measure_parts(
    stack: ScoreStack,
    log_prior_E: torch.Tensor,
    posterior: Posterior,
    blocks: int | None = None,
    tops: Sequence[int] = (),
) -> Parts:
    """Takes a text's first blocks in hash order, or all of them."""
    experts, end = len(log_prior_E), len(stack) if blocks is None else min(blocks, len(stack))
    total_1 = torch.zeros(1, dtype=torch.float64)
    alone_E, weights_E, without_E = torch.zeros(3, experts, dtype=torch.float64)
    of_top_K = torch.zeros(len(tops), dtype=torch.float64)
    tokens = 0
    for start in range(0, end, BLOCKS_AT_ONCE):
        logp_EBT, mask_BT = stack.take(start, min(start + BLOCKS_AT_ONCE, end))
        log_weights_EBT = log_posterior(logp_EBT, log_prior_E, posterior)
        total_1 += torch.logsumexp(log_weights_EBT + logp_EBT, dim=0)[mask_BT].sum()
        alone_E += logp_EBT[:, mask_BT].sum(1)
        weights_E += log_weights_EBT.exp()[:, mask_BT].sum(1)
        if experts > 1:
            without_E += leave_one_out(logp_EBT, log_prior_E, posterior)[:, mask_BT].sum(1)
        for i, k in enumerate(tops):
            of_top_K[i] += log_mixture(logp_EBT, keep_top(log_prior_E, k), posterior)[mask_BT].sum()
        tokens += int(mask_BT.sum())
    whole, alone, without, of_top = (
        tuple(perplexity(sums, torch.tensor(tokens)).tolist())
        for sums in (total_1, alone_E, without_E, of_top_K)
    )
    weights = tuple((weights_E / tokens).tolist())
    return Parts(whole[0], alone, weights, without if experts > 1 else (), of_top, tokens)
