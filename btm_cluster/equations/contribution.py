"""The worth of each expert to an ensemble: the ensemble without it, for all experts in one pass."""

import math

import torch

from btm_cluster.equations.posterior import Posterior, evidence, uniform_prior

FLOOR = 1e-6
"""Share of the prior that is spread evenly, so that the others can take
over where one expert had all of it."""


def leave_one_out(logp_EBT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """log p(x_t | x_<t) of the ensemble without each expert, its prior shared
    out among the others: [E, B, T].

    As `log_mixture` of the others for each expert in turn, but linear in their number.
    """
    if len(logp_EBT) == 1:
        raise ValueError("an ensemble of one expert has none to leave out")
    floored_E = torch.logaddexp(log_prior_E + math.log1p(-FLOOR), uniform_prior(logp_EBT) + math.log(FLOOR))
    weight_EBT = floored_E[:, None, None] + evidence(logp_EBT, posterior)
    return _without_each(weight_EBT + logp_EBT) - _without_each(weight_EBT)


def _without_each(log_EBT: torch.Tensor) -> torch.Tensor:
    """logsumexp over all others, of each: from what stands before it and what stands behind it. [E, B, T]."""
    nothing_BT = torch.full_like(log_EBT[:1], -torch.inf)
    before_EBT = torch.cat([nothing_BT, log_EBT.logcumsumexp(0)[:-1]])
    behind_EBT = torch.cat([log_EBT.flip(0).logcumsumexp(0).flip(0)[1:], nothing_BT])
    return torch.logaddexp(before_EBT, behind_EBT)
