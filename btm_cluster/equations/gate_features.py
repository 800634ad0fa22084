"""Features of each expert before a token, which a learned gate sees.

The expert's discounted evidence and entropies relative to its siblings', the entropy of the prediction it is
about to make, and whether it has lately been more surprised than it expected to be. F features, N tokens,
beside the letters of the package.
"""

from collections.abc import Iterator

import torch

from btm_cluster.equations.gates import DISCOUNTS
from btm_cluster.equations.posterior import discounted_sums

STRETCH_SCORES = 2**14
"""Experts times tokens whose features are made at once: two megabytes, which fit a processor's cache."""


def features(logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor, taken_BT: torch.Tensor) -> torch.Tensor:
    """Features of each expert before the taken tokens are seen: float32 [E, N, F].

    All of the block, none of the future.
    """
    return torch.cat(list(stretches_of_features(logp_EBT, entropy_EBT, taken_BT)), dim=1)


def stretches_of_features(
    logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor, taken_BT: torch.Tensor
) -> Iterator[torch.Tensor]:
    """The same, some tokens at a time: [E, n, F]."""
    counts_GT = discounted_sums(torch.ones(1, 1, logp_EBT.shape[-1]), DISCOUNTS)[:, 0, 0]
    logp_EBT, entropy_EBT = logp_EBT.float(), entropy_EBT.float()
    every = (
        discounted_sums(logp_EBT, DISCOUNTS),
        discounted_sums(entropy_EBT, DISCOUNTS),
        counts_GT[:, None].expand(-1, *taken_BT.shape),
        entropy_EBT,
    )
    if bool(taken_BT.all()):  # as in most development blocks: nothing is copied
        every_N = [values_BT.flatten(-2) for values_BT in every]
    else:
        every_N = [values_BT[..., taken_BT] for values_BT in every]
    tokens = max(1, STRETCH_SCORES // len(logp_EBT))
    for some in zip(*(torch.split(values_N, tokens, -1) for values_N in every_N), strict=True):
        yield features_of_sums(*some)


def features_of_sums(
    logp_GEN: torch.Tensor, entropy_GEN: torch.Tensor, counts_GN: torch.Tensor, entropy_EN: torch.Tensor
) -> torch.Tensor:
    """The features from the discounted sums before each token, the discounted
    numbers of tokens, and the next entropies.

    Sums of n tokens are divided by √n, so that noise has the same size under every discount. [E, N, F].
    """
    counts_GN = counts_GN.clamp(min=1)
    roots_GN = counts_GN.sqrt()[:, None]
    evidence_GEN = logp_GEN / roots_GN
    expected_GEN = entropy_GEN / roots_GN
    surprise_GEN = (-evidence_GEN - expected_GEN)[2:]  # of a token or two it is mostly chance
    own = [
        *_apart(evidence_GEN),
        *_apart(expected_GEN[1:]),
        *_apart(surprise_GEN),
        *_apart(entropy_EN[None]),
    ]
    shared = [
        *(evidence_GEN[:5] / roots_GN[:5]).mean(1, keepdim=True).expand_as(evidence_GEN[:5]),
        *surprise_GEN[-3:].mean(1, keepdim=True).expand_as(surprise_GEN[-3:]),
        entropy_EN.mean(0, keepdim=True).expand_as(entropy_EN),
        _apart(entropy_EN[None])[0].abs().mean(0, keepdim=True).expand_as(entropy_EN),
        counts_GN[-1].log().expand_as(entropy_EN),
    ]
    return torch.stack([*own, *shared], dim=-1)


def _apart(values_GEN: torch.Tensor) -> torch.Tensor:
    return values_GEN - values_GEN.mean(1, keepdim=True)
