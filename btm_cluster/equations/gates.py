"""Gates: mixtures over experts whose weights at token t are any function of what is known before t.

The posterior of posterior.py is one of them. Here are two from the literature that repair its
over-confidence: fixed share, which lets the best expert change within a block, and several discounts at once,
each with a weight of its own. learned_gate.py holds the one that is trained. Every fit is a frozen value of
tensors and numbers.

N tokens of all blocks, G discounts, beside the letters of the package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from btm_cluster.equations.calibration import minimise
from btm_cluster.equations.posterior import discounted_sums, uniform_prior
from btm_cluster.equations.running import RunningFixedShare, RunningGate, RunningSums

DISCOUNTS = (0.0, 0.5, 0.8, 0.9, 0.97, 0.99, 1.0)
"""γ of `fit_discounts`: from the last token alone to the whole prefix."""
DISCOUNT_RIDGE = 10.0
"""Nats by which a scaled β of √2 is held against the whole likelihood: as much as a few tokens say."""
PRIOR_RIDGE = 10.0
"""The same for the log-prior, against the uniform one."""
SWITCHING_RATES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)
"""α tried by `fit_fixed_share`."""
TEMPERATURES = (1.0, 2.0, 3.0, 5.0, 8.0, 16.0)
"""τ tried by `fit_fixed_share`."""
FIT_TOKENS = 200_000
"""Tokens that a fit looks at; of more, every n-th is taken."""


class Gate(Protocol):
    """How experts are weighted, once it is fitted."""

    def log_weights(self, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor) -> torch.Tensor:
        """The log-weight of each expert at each token t, from tokens before t and
        the entropies up to t: [E, B, T].

        `entropy_EBT` is each expert's entropy in nats of its prediction of token t, which is known before t
        is seen.
        """

    def running(self) -> RunningGate:
        """The same weights, token by token."""


@dataclass(frozen=True)
class FixedShare:
    """Before every token the expert in charge is drawn anew from the prior with
    probability α; evidence counts 1/τ.

    Source: Herbster and Warmuth, Tracking the best expert, 1998; theirs draws from the other experts,
    uniformly.
    """

    log_prior_E: torch.Tensor
    switching_rate: float
    """α, from 0 (the full posterior) to 1 (the prior alone)."""
    temperature: float = 1.0

    def log_weights(self, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """log Σ over all paths of experts that end in j at t, of the path's prior
        times its likelihood; normalised."""
        prior_EB = self.log_prior_E[:, None].expand(logp_EBT.shape[:2])
        log_stay, log_switch = self._log_rates()
        weights_EBT = torch.empty_like(logp_EBT)
        now_EB = torch.log_softmax(prior_EB, dim=0)
        for t in range(logp_EBT.shape[-1]):
            weights_EBT[..., t] = now_EB
            seen_EB = torch.log_softmax(now_EB + logp_EBT[..., t] / self.temperature, dim=0)
            now_EB = torch.logaddexp(log_stay + seen_EB, log_switch + prior_EB)
        return weights_EBT

    def running(self) -> RunningGate:
        """The same weights, token by token."""
        return RunningFixedShare(self.log_prior_E.double(), *self._log_rates(), self.temperature)

    def _log_rates(self) -> tuple[float, float]:
        """log(1 - α) and log α."""
        log_stay = math.log1p(-self.switching_rate) if self.switching_rate < 1 else -math.inf
        return log_stay, math.log(self.switching_rate) if self.switching_rate > 0 else -math.inf


@dataclass(frozen=True)
class Discounts:
    """log w_j(t) = b_j + Σ_i β_i Σ_{u<t} γ_i^(t-1-u) log p_j(x_u|x_<u), normalised over experts."""

    log_prior_E: torch.Tensor
    discounts: tuple[float, ...]
    weights_G: torch.Tensor
    """β of each discount; one may be negative where another outweighs it."""

    def log_weights(self, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """As the class says. At position 0 they are the prior."""
        sums_GEBT = discounted_sums(logp_EBT, self.discounts)
        evidence_EBT = torch.einsum("g,gebt->ebt", self.weights_G.to(logp_EBT), sums_GEBT)
        return torch.log_softmax(self.log_prior_E[:, None, None] + evidence_EBT, dim=0)

    def running(self) -> RunningGate:
        """The same weights, token by token."""
        discounts_G = torch.tensor(self.discounts, dtype=torch.float64)
        return RunningSums(self.log_prior_E.double(), discounts_G, self.weights_G.double())


def log_gated_mixture(gate: Gate, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor) -> torch.Tensor:
    """log p(x_t | x_<t) of the ensemble under a gate: [B, T]."""
    return torch.logsumexp(gate.log_weights(logp_EBT, entropy_EBT) + logp_EBT, dim=0)


def gate_loss(gate: Gate, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Mean negative log-likelihood of the real tokens, in nats."""
    return -float(log_gated_mixture(gate, logp_EBT, entropy_EBT)[mask_BT].mean())


def fit_fixed_share(
    logp_EBT: torch.Tensor, mask_BT: torch.Tensor, log_prior_E: torch.Tensor | None = None
) -> FixedShare:
    """The switching rate and temperature, of those listed above, that serve
    the blocks best, under a given prior."""
    log_prior_E = uniform_prior(logp_EBT) if log_prior_E is None else log_prior_E

    def loss(gate: FixedShare) -> float:
        return gate_loss(gate, logp_EBT, logp_EBT, mask_BT) if mask_BT.any() else 0.0

    tried = [
        FixedShare(log_prior_E, rate, temperature) for rate in SWITCHING_RATES for temperature in TEMPERATURES
    ]
    return min(tried, key=loss)


def fit_discounts(
    logp_EBT: torch.Tensor,
    mask_BT: torch.Tensor,
    discounts: Sequence[float] = DISCOUNTS,
    fits_prior: bool = True,
    ridge: float = DISCOUNT_RIDGE,
    prior_ridge: float = PRIOR_RIDGE,
) -> Discounts:
    """Fits b and all β to blocks: the maximum of the mixture's likelihood, held by a ridge.

    Without `fits_prior`, b is uniform.

    A sum over more of the past is larger, so each β is held in units of its sum's size: what counts is how
    much a discount moves the weights.
    """
    if not mask_BT.any():
        return Discounts(
            uniform_prior(logp_EBT), tuple(discounts), torch.zeros(len(discounts), dtype=logp_EBT.dtype)
        )
    taken_BT = take_evenly(mask_BT, FIT_TOKENS)
    logp_EN = logp_EBT[:, taken_BT]
    sums_GEN = discounted_sums(logp_EBT, discounts)[:, :, taken_BT]
    sums_GEN = sums_GEN - sums_GEN.mean(dim=1, keepdim=True)  # what all experts share moves no weight
    scale_G = sums_GEN.pow(2).mean((1, 2)).sqrt().clamp(min=1e-12)
    sums_GEN = sums_GEN / scale_G[:, None, None]
    bias_E = torch.zeros(len(logp_EBT), dtype=logp_EBT.dtype, requires_grad=fits_prior)
    weights_G = torch.zeros(len(discounts), dtype=logp_EBT.dtype, requires_grad=True)

    def loss() -> torch.Tensor:
        scores_EN = bias_E[:, None] + torch.einsum("g,gen->en", weights_G, sums_GEN)
        likelihood = torch.logsumexp(torch.log_softmax(scores_EN, dim=0) + logp_EN, dim=0).sum()
        held = ridge * weights_G.pow(2).sum() + prior_ridge * (bias_E - bias_E.mean()).pow(2).sum()
        return (held / 2 - likelihood) / logp_EN.shape[1]

    minimise(loss, [bias_E, weights_G] if fits_prior else [weights_G])
    return Discounts(
        torch.log_softmax(bias_E.detach(), dim=0), tuple(discounts), weights_G.detach() / scale_G
    )


def take_evenly(mask_BT: torch.Tensor, most: int) -> torch.Tensor:
    """The mask with at most `most` of its tokens, spread evenly: [B, T]."""
    places = mask_BT.flatten().nonzero()[:, 0]
    if len(places) <= most:
        return mask_BT
    kept = torch.zeros(mask_BT.numel(), dtype=torch.bool)
    kept[places[torch.arange(most) * len(places) // most]] = True
    return kept.view_as(mask_BT)
