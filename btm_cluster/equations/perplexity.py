"""Perplexity and bits per byte of text under any model or ensemble, and intervals over documents.

The one definition of both. Perplexity is exp of the mean negative log-probability per token, each document's
end-of-text token among them. Bits per byte take the text alone: end-of-text tokens are left out above, and
have no byte below, so that models with different tokenizers can be held against each other.

U is what is counted: tokens (TOKENS), and bytes of the text in UTF-8 (BYTES). S systems, R resamples, beside
the letters of the package.
"""

import math

import torch

TOKENS, BYTES = 0, 1
"""Rows of an axis U. Log-probabilities: of all tokens, and of those that are no end of text. Sizes: tokens,
and bytes."""
RESAMPLED_AT_ONCE = 4_000_000
"""Counts held at once while resampling: 32 MB."""


def perplexity(logp: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """exp(-logp / tokens), of a summed log-probability in nats: any shape."""
    return torch.exp(-logp / tokens)


def bits_per_byte(logp: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Bits that a code by the model spends on a byte of text: any shape. `logp` in nats, without end-of-text."""
    return -logp / sizes / math.log(2)


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
        parts.append(perplexity(logp_SD @ counts_RD.T, counts_RD @ tokens_D))
    return torch.cat(parts, dim=1)


def interval(values_R: torch.Tensor, coverage: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `coverage` of the values."""
    tail = (1 - coverage) / 2
    low, high = torch.quantile(values_R, torch.tensor([tail, 1 - tail], dtype=values_R.dtype))
    return float(low), float(high)
