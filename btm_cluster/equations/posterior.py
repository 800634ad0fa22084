"""The domain posterior p(D=j | x_<t), and the prior p(D=j) estimated on a target's development blocks.

    p(x_t | x_<t)    = Σ_j p_j(x_t | x_<t) · p(D=j | x_<t)
    p(D=j | x_<t)    ∝ p_j(x_<t) · p(D=j)                                   paper, section 2

What the posterior sees of x_<t is its evidence: all of it (the equation), the last token (the released
scorer), the last w tokens, or all of it, discounted and weighed (calibrated). Everything is in log space.
`logp_EBT` holds each expert's log-probability of each actual token; padding tokens have log-probability 0
under every expert, and `mask_BT` leaves them out of what is estimated.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

Kind = Literal["calibrated", "full", "last-token", "window"]
PriorKind = Literal["fitted", "ema", "mean", "uniform"]

EMA_RATE = 0.3
"""λ of the paper's running estimate of the prior: the weight of the newest block."""
EM_TOLERANCE = 1e-11
EM_STEPS = 5000
STRETCH_TOKENS = 32
"""Tokens whose discounted sums come of one product of matrices; stretches are joined by another."""


@dataclass(frozen=True)
class Posterior:
    """How evidence is gathered: over which tokens, how fast it is forgotten, and how much it counts."""

    kind: Kind
    window_tokens: int = 32
    discount: float = 0.97
    weight: float = 1.0
    """β, by which evidence is multiplied; 1 for the paper's."""


def evidence(logp_EBT: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """Evidence for each expert before token t: Σ_{u<t} of its
    log-probabilities, as `posterior` says. [E, B, T]."""
    if posterior.kind == "calibrated":
        return posterior.weight * discounted_sums(logp_EBT, [posterior.discount])[0]
    shifted_EBT = torch.cat([torch.zeros_like(logp_EBT[..., :1]), logp_EBT[..., :-1]], dim=-1)
    if posterior.kind == "last-token":
        summed_EBT = shifted_EBT
    elif posterior.kind == "full":
        summed_EBT = shifted_EBT.cumsum(-1)
    else:
        summed_EBT = _windowed_sum(shifted_EBT, posterior.window_tokens)
    return posterior.weight * summed_EBT


def log_posterior(logp_EBT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """log p(D=j | x_<t) for every token: [E, B, T]. At position 0 it is the prior."""
    return torch.log_softmax(log_prior_E[:, None, None] + evidence(logp_EBT, posterior), dim=0)


def log_prior(
    kind: PriorKind, logp_EBT: torch.Tensor, mask_BT: torch.Tensor, posterior: Posterior
) -> torch.Tensor:
    """log p(D=j) estimated on development blocks in hash order: [E]. Without a token it is uniform."""
    if kind == "uniform" or not mask_BT.any():
        return uniform_prior(logp_EBT)
    if kind == "ema":
        return ema_prior(logp_EBT)
    if kind == "mean":
        return mean_prior(logp_EBT, mask_BT, posterior)
    return fitted_prior(logp_EBT, mask_BT)


def uniform_prior(logp_EBT: torch.Tensor) -> torch.Tensor:
    """log 1/E: [E]."""
    return torch.log_softmax(logp_EBT.new_zeros(len(logp_EBT)), dim=0)


def ema_prior(logp_EBT: torch.Tensor, rate: float = EMA_RATE) -> torch.Tensor:
    """The paper's: q_1 = post_1, q_i = (1-λ) q_{i-1} + λ post_i, with post_i the
    end-of-block posterior under q_{i-1}.

    In log space throughout, since q_1 rounds to one-hot as a probability and could never leave it. [E].
    """
    block_logp_EB = logp_EBT.sum(-1)
    log_q_E = uniform_prior(logp_EBT)
    log_keep = torch.log1p(torch.tensor(-rate, dtype=logp_EBT.dtype))
    log_take = torch.log(torch.tensor(rate, dtype=logp_EBT.dtype))
    for i in range(block_logp_EB.shape[1]):
        log_post_E = torch.log_softmax(log_q_E + block_logp_EB[:, i], dim=0)
        log_q_E = log_post_E if i == 0 else torch.logaddexp(log_keep + log_q_E, log_take + log_post_E)
    return torch.log_softmax(log_q_E, dim=0)


def block_posterior(logp_EBT: torch.Tensor) -> torch.Tensor:
    """p(D=j | the whole block), all experts alike before: [E, B]."""
    return torch.softmax(logp_EBT.sum(-1), dim=0)


def mean_prior(logp_EBT: torch.Tensor, mask_BT: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """Average responsibility over tokens, under a uniform prior: [E]."""
    uniform_E = torch.zeros(logp_EBT.shape[0], dtype=logp_EBT.dtype)
    responsibility_EBT = responsibilities(logp_EBT, uniform_E, posterior)
    return (responsibility_EBT * mask_BT).sum((1, 2)).div(mask_BT.sum()).log()


def fitted_prior(
    logp_EBT: torch.Tensor, mask_BT: torch.Tensor, tolerance: float = EM_TOLERANCE
) -> torch.Tensor:
    """The mixture weights, fixed over all tokens, that maximise the likelihood of the blocks, by EM: [E].

    The likelihoods are scaled per token by their maximum, so that nothing under- or overflows and a step
    needs no exp.
    """
    logp_EN = logp_EBT[:, mask_BT].double()
    scaled_EN = (logp_EN - logp_EN.max(dim=0).values).exp()
    experts, tokens = scaled_EN.shape
    w_E = torch.full((experts,), 1.0 / experts, dtype=torch.float64)
    before = -math.inf
    for _ in range(EM_STEPS):
        mixture_N = w_E @ scaled_EN
        after = float(mixture_N.log().mean())
        if after - before < tolerance:
            break
        before = after
        w_E = w_E * (scaled_EN @ mixture_N.reciprocal()) / tokens
    return torch.log(w_E / w_E.sum()).to(logp_EBT.dtype)


def discounted_sums(values_EBT: torch.Tensor, discounts: Sequence[float]) -> torch.Tensor:
    """Σ_{u<t} γ^(t-1-u) of finite values, for each γ: [G, E, B, T]. Zero at position 0.

    A product of matrices within each stretch of tokens, and the same for what earlier stretches sum to: a pass
    token by token would take a thousand small operations, one after the other.
    """
    tokens = values_EBT.shape[-1]
    if tokens <= STRETCH_TOKENS:
        return torch.stack([values_EBT @ _discounts(rate, tokens).to(values_EBT) for rate in discounts])
    stretches = -(-tokens // STRETCH_TOKENS)
    missing = stretches * STRETCH_TOKENS - tokens
    filled_EBT = functional.pad(values_EBT, (0, missing)) if missing else values_EBT
    values_EBSU = filled_EBT.reshape(*values_EBT.shape[:-1], stretches, STRETCH_TOKENS)
    sums_GEBSU = values_EBSU.new_empty(len(discounts), *values_EBSU.shape)
    for rate, sums_EBSU in zip(discounts, sums_GEBSU, strict=True):
        torch.matmul(values_EBSU, _discounts(rate, STRETCH_TOKENS).to(values_EBT), out=sums_EBSU)
        whole_EBS = sums_EBSU[..., -1] * rate + values_EBSU[..., -1]
        before_EBS = discounted_sums(whole_EBS, [rate**STRETCH_TOKENS])[0]
        fading_U = torch.tensor(rate, dtype=torch.float64) ** torch.arange(STRETCH_TOKENS)
        sums_EBSU.addcmul_(before_EBS[..., None], fading_U.to(values_EBT))
    return sums_GEBSU.flatten(-2)[..., :tokens]


def _discounts(rate: float, tokens: int) -> torch.Tensor:
    """Weights [U, T] of token u in the sum before token t: γ^(t-1-u) for u < t, else 0."""
    ages_UT = torch.arange(tokens) - 1 - torch.arange(tokens)[:, None]
    counts_UT = torch.tensor(rate, dtype=torch.float64) ** ages_UT.clamp(min=0)
    return torch.where(ages_UT < 0, 0.0, counts_UT)


def responsibilities(logp_EBT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """p(D=j | x_≤t): each expert's share in explaining each token once it is seen. [E, B, T]."""
    return torch.softmax(log_posterior(logp_EBT, log_prior_E, posterior) + logp_EBT, dim=0)


def keep_top(log_prior_E: torch.Tensor, k: int | None) -> torch.Tensor:
    """The prior with all but its k largest entries at -inf, renormalised: [E].

    Dropped experts need not run.
    """
    if k is None or k >= len(log_prior_E):
        return log_prior_E
    kept = torch.full_like(log_prior_E, -torch.inf)
    best = log_prior_E.topk(k).indices
    kept[best] = log_prior_E[best]
    return torch.log_softmax(kept, dim=0)


def _windowed_sum(shifted_EBT: torch.Tensor, window: int) -> torch.Tensor:
    total_EBT = shifted_EBT.cumsum(-1)
    total_EBT[..., window:] = total_EBT[..., window:] - total_EBT[..., :-window].clone()
    return total_EBT
