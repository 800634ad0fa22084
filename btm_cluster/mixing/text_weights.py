"""Weights of an average for a text, from its blocks' scores under each expert, and how far blocks differ.

Knows of log-probabilities alone.
"""

from dataclasses import dataclass

import torch

from btm_cluster.equations.averaging import argmax_weights, posterior_weights
from btm_cluster.equations.posterior import PriorKind, block_posterior, log_prior
from btm_cluster.mixing.fitting import FULL


@dataclass(frozen=True)
class ModelWeight:
    """A model's weight for a text, and how far the text's blocks differ in it."""

    weight: float
    block_mean: float
    """Mean over blocks of p(D=j | the whole block), all models alike before."""
    block_deviation: float
    """Standard deviation over blocks of the same; 0 of a single block."""


@dataclass(frozen=True)
class TextWeights:
    """Weights of models for a text."""

    models: tuple[ModelWeight, ...]
    """In their order; the weights sum to one."""
    blocks: int
    tokens: int


def weigh(logp_EBT: torch.Tensor, mask_BT: torch.Tensor, prior: PriorKind | None) -> TextWeights:
    """Weights by a prior that is estimated on the blocks, in hash order; without one, all weight goes to the
    model with the largest prior of the paper.

    `logp_EBT` is 0 where `mask_BT` has padding.
    """
    log_prior_E = log_prior(prior or "ema", logp_EBT, mask_BT, FULL)
    weights = posterior_weights(log_prior_E.exp()) if prior else argmax_weights(log_prior_E)
    posterior_EB = block_posterior(logp_EBT)
    deviations = posterior_EB.std(1, correction=min(1, len(mask_BT) - 1)).tolist()
    models = map(ModelWeight, weights, posterior_EB.mean(1).tolist(), deviations)
    return TextWeights(tuple(models), len(mask_BT), int(mask_BT.sum()))
