"""The ensemble's log-probabilities, and what is reported of any model's:
perplexity and intervals over documents.

S systems, beside the letters of the package.
"""

import torch

from btm_cluster.equations.posterior import Posterior, log_posterior

RESAMPLED_AT_ONCE = 4_000_000
"""Counts held at once while resampling: 32 MB."""


def log_mixture(logp_EBT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior) -> torch.Tensor:
    """log p(x_t | x_<t) of the ensemble, a mixture in probability space: [B, T].

    Source: paper, equation 1.
    """
    return torch.logsumexp(log_posterior(logp_EBT, log_prior_E, posterior) + logp_EBT, dim=0)


def document_sums(logp_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    """Summed log-probability of each document: [D]. `documents_BT` numbers them, -1 for padding."""
    real_BT = documents_BT >= 0
    owners = documents_BT[real_BT].long()
    count = int(owners.max()) + 1 if len(owners) else 0
    return torch.zeros(count, dtype=torch.float64).index_add_(0, owners, logp_BT[real_BT].double())


def document_tokens(documents_BT: torch.Tensor) -> torch.Tensor:
    """Number of tokens of each document: [D]."""
    return document_sums(torch.ones_like(documents_BT, dtype=torch.float64), documents_BT)


def perplexity(logp_SD: torch.Tensor, tokens_D: torch.Tensor) -> torch.Tensor:
    """exp of the mean negative log-probability per token, for each system: [S]."""
    return torch.exp(-logp_SD.sum(-1) / tokens_D.sum())


def resampled_perplexity(
    logp_SD: torch.Tensor, tokens_D: torch.Tensor, resamples: int, random_seed: int
) -> torch.Tensor:
    """Perplexities over bootstrap resamples of the documents: [S, R].

    All systems see the same resamples: paired.
    """
    documents = len(tokens_D)
    generator = torch.Generator().manual_seed(random_seed)
    at_once = max(1, RESAMPLED_AT_ONCE // documents)
    parts = []
    for start in range(0, resamples, at_once):
        drawn_RD = torch.randint(documents, (min(at_once, resamples - start), documents), generator=generator)
        counts_RD = torch.zeros(drawn_RD.shape, dtype=torch.float64)
        counts_RD.scatter_add_(1, drawn_RD, torch.ones_like(counts_RD))
        parts.append(torch.exp(-(logp_SD @ counts_RD.T) / (counts_RD @ tokens_D)))
    return torch.cat(parts, dim=1)


def interval(values_R: torch.Tensor, coverage: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `coverage` of the values."""
    tail = (1 - coverage) / 2
    low, high = torch.quantile(values_R, torch.tensor([tail, 1 - tail], dtype=values_R.dtype))
    return float(low), float(high)
