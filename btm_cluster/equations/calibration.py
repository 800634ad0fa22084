"""The calibrated posterior, fitted: the log-prior and the weight of evidence under
which development blocks are likeliest.

N tokens of all blocks, cut into stretches S of n, beside the letters of the package.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from btm_cluster.equations.posterior import Posterior, evidence, fitted_prior, uniform_prior

LBFGS_STEPS = 200
TOKENS_AT_ONCE = 4096
"""Tokens in a stretch of a fit: the scores of eight experts take a quarter of a
megabyte, which fits a processor's cache."""
DEFAULT_EVIDENCE_WEIGHT = 0.22
"""β where nothing can be fitted: what a prototype fitted over sixteen domains."""
LITTLE_EVIDENCE_WEIGHT = 0.01
"""β of the second start of a fit: near the mixture without evidence."""
GAIN_THAT_COUNTS = 1e-6
"""Nats per token.

Below it, a climbed fit is as good as EM's and safer: EM sends a useless expert's weight to zero for ever.
"""


def calibrate(
    logp_EBT: torch.Tensor,
    mask_BT: torch.Tensor,
    posterior: Posterior,
    log_prior_E: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Posterior]:
    """Fits the log-prior [E] and the weight β of discounted evidence to blocks,
    by maximum likelihood of the mixture.

    With `log_prior_E` given, only β is fitted. The likelihood has several maxima where blocks are few, so it
    is climbed from two starts; where both end below the mixture without evidence (EM's prior, β = 0), that is
    taken instead.
    """
    if not mask_BT.any():
        log_prior_E = uniform_prior(logp_EBT) if log_prior_E is None else log_prior_E
        return log_prior_E, replace(posterior, kind="calibrated", weight=DEFAULT_EVIDENCE_WEIGHT)
    evidence_EN = evidence(logp_EBT, replace(posterior, kind="calibrated", weight=1.0))[:, mask_BT]
    tokens = _Tokens.of(evidence_EN, logp_EBT[:, mask_BT])
    if log_prior_E is None:
        plain_E = fitted_prior(logp_EBT, mask_BT, tolerance=GAIN_THAT_COUNTS / 10)
        # The second start keeps away from the corners, where an expert's share has no slope to climb.
        inner_E = torch.logaddexp(plain_E + math.log(0.9), uniform_prior(logp_EBT) + math.log(0.1))
        starts = [(uniform_prior(logp_EBT), DEFAULT_EVIDENCE_WEIGHT), (inner_E, LITTLE_EVIDENCE_WEIGHT)]
    else:
        plain_E = log_prior_E
        starts = [(log_prior_E, DEFAULT_EVIDENCE_WEIGHT), (log_prior_E, LITTLE_EVIDENCE_WEIGHT)]

    def loss(fit: tuple[torch.Tensor, float]) -> float:
        value = float(tokens.loss(fit[0], torch.tensor(fit[1], dtype=fit[0].dtype)))
        return value if math.isfinite(value) else math.inf  # a step too far leaves β at infinity

    fits = [_climb(tokens, *start, fits_prior=log_prior_E is None) for start in starts]
    best = min(fits, key=loss)
    if loss(best) > loss((plain_E, 0.0)) + GAIN_THAT_COUNTS:
        best = (plain_E, 0.0)
    return best[0], replace(posterior, kind="calibrated", weight=best[1])


def minimise(loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """Moves parameters to a minimum of a smooth loss, by L-BFGS."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=LBFGS_STEPS,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-8,
        tolerance_change=1e-11,
    )

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Tokens:
    """Scores that a mixture is fitted on, cut into stretches of tokens [E, n] that fit a processor's cache:
    evidence, and likelihood relative to the token's best expert."""

    evidence_SEN: Sequence[torch.Tensor]
    likelihood_SEN: Sequence[torch.Tensor]
    best_logp: float
    """The mean log-probability of each token's best expert, in nats."""
    count: int

    @classmethod
    def of(cls, evidence_EN: torch.Tensor, logp_EN: torch.Tensor) -> "_Tokens":
        best_N = logp_EN.max(dim=0).values
        evidence_EN, likelihood_EN = evidence_EN - evidence_EN.max(dim=0).values, (logp_EN - best_N).exp()
        return cls(_stretches(evidence_EN), _stretches(likelihood_EN), float(best_N.mean()), len(best_N))

    def loss(self, bias_E: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the tokens under the mixture, in
        nats; it has a gradient for both."""
        loss: torch.Tensor = _MixtureLoss.apply(bias_E, weight, self)  # type: ignore[no-untyped-call]
        return loss


def _stretches(values_EN: torch.Tensor) -> list[torch.Tensor]:
    return [part.contiguous() for part in torch.split(values_EN, TOKENS_AT_ONCE, dim=1)]


class _MixtureLoss(torch.autograd.Function):
    """-Σ_n log Σ_j w_jn p_jn, w = softmax of b_j + β e_jn, with its gradient
    in the same pass over the tokens.

    With r_jn = w_jn p_jn / Σ_i w_in p_in:   d/db_j = Σ_n (w_jn - r_jn),   d/dβ = Σ_jn (w_jn - r_jn) e_jn
    """

    @staticmethod
    def forward(ctx: Any, bias_E: torch.Tensor, weight: torch.Tensor, tokens: _Tokens) -> torch.Tensor:
        loss, slope, slope_E = weight.new_zeros(()), weight.new_zeros(()), torch.zeros_like(bias_E)
        for evidence_EN, likelihood_EN in zip(tokens.evidence_SEN, tokens.likelihood_SEN, strict=True):
            w_EN = torch.add(bias_E[:, None], evidence_EN * weight)
            w_EN.sub_(w_EN.amax(0)).exp_()
            w_EN.div_(w_EN.sum(0))
            r_EN = w_EN * likelihood_EN
            mixture_N = r_EN.sum(0)
            loss -= mixture_N.log().sum()
            change_EN = w_EN.sub_(r_EN.div_(mixture_N))
            slope_E += change_EN.sum(1)
            slope += change_EN.mul_(evidence_EN).sum()
        ctx.slopes = slope_E / tokens.count, slope / tokens.count
        return loss / tokens.count - tokens.best_logp

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        slope_E, slope = ctx.slopes
        return upstream[0] * slope_E, upstream[0] * slope, None


def _climb(
    tokens: _Tokens, start_E: torch.Tensor, start_weight: float, fits_prior: bool
) -> tuple[torch.Tensor, float]:
    """The log-prior [E] and β of a maximum of the likelihood near a start.

    L-BFGS; β = exp(·) stays positive.
    """
    bias_E = start_E.detach().clone().requires_grad_(fits_prior)
    log_weight = torch.tensor(start_weight, dtype=start_E.dtype).log().requires_grad_(True)
    minimise(
        lambda: tokens.loss(bias_E, log_weight.exp()), [bias_E, log_weight] if fits_prior else [log_weight]
    )
    return torch.log_softmax(bias_E.detach(), dim=0), float(log_weight.detach().exp())
