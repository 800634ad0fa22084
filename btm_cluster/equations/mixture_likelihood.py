"""The likelihood of tokens under a mixture whose weights are softmax(b_j + β e_jn), with its first and second
derivatives; and its maximum, by Newton's method.

N tokens of all blocks, cut into stretches S; P parameters: the E log-priors b, then log β. Beside the letters
of the package.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from btm_cluster.equations.newton_steps import CurvatureProducts, WholeCurvature

SCORES_AT_ONCE = 2**16
"""Scores in a stretch, experts times tokens: half a megabyte, which fits a processor's cache."""
NEWTON_STEPS = 200
MOST_EXPERTS_OF_WHOLE = 128
"""Whose curvature is a matrix: that costs by the square of their number, and its eigenvalues by the cube."""
LEAST_DAMPING, FIRST_DAMPING, MOST_DAMPING = 1e-9, 1e-3, 1e3
Fit = tuple[torch.Tensor, float]
"""A log-prior [E] and β."""


@dataclass(frozen=True)
class Slopes:
    """Mean negative log-likelihood of the tokens in nats, its gradient and its curvature at some parameters."""

    loss: float
    gradient_P: torch.Tensor
    curvature: WholeCurvature | CurvatureProducts


@dataclass(frozen=True)
class MixtureLikelihood:
    """Scores that a mixture is fitted on, cut into stretches of tokens [E, n] that fit a processor's cache:
    evidence, and likelihood relative to the token's best expert."""

    evidence_SEN: Sequence[torch.Tensor]
    likelihood_SEN: Sequence[torch.Tensor]
    best_logp: float
    """The mean log-probability of each token's best expert, in nats."""
    count: int

    @classmethod
    def of(cls, evidence_EN: torch.Tensor, logp_EN: torch.Tensor) -> "MixtureLikelihood":
        """The scores, from evidence and log-probabilities of each token under each expert."""
        experts, count = logp_EN.shape
        tokens = max(1, SCORES_AT_ONCE // experts)
        best_logp, evidence_SEN, likelihood_SEN = 0.0, [], []
        for some_EN, some_logp_EN in zip(
            torch.split(evidence_EN, tokens, 1), torch.split(logp_EN, tokens, 1), strict=True
        ):
            best_N = some_logp_EN.amax(0)
            best_logp += float(best_N.sum())
            evidence_SEN.append((some_EN - some_EN.amax(0)).contiguous())
            likelihood_SEN.append((some_logp_EN - best_N).exp_().contiguous())
        return cls(evidence_SEN, likelihood_SEN, best_logp / count, count)

    def loss(self, fit: Fit) -> float:
        """Mean negative log-likelihood, in nats; infinite where a step too far has left β there."""
        total = 0.0
        for evidence_EN, likelihood_EN in zip(self.evidence_SEN, self.likelihood_SEN, strict=True):
            w_EN = _weights(fit[0], fit[1], evidence_EN)
            total -= float((w_EN * likelihood_EN).sum(0).log_().sum())
        loss = total / self.count - self.best_logp
        return loss if math.isfinite(loss) else math.inf

    def slopes(self, bias_E: torch.Tensor, log_weight: float, spare: Slopes | None = None) -> Slopes:
        """Loss, gradient and curvature by b and log β. The curvature of `spare` is written over.

        With r_jn = w_jn p_jn / Σ_i w_in p_in:   d/db_j = Σ_n (w_jn - r_jn),   d/dβ = Σ_jn (w_jn - r_jn) e_jn,
        and the curvature is the covariance of (1_j, e_j) under w, less that under r, summed over tokens. Of both,
        w wᵀ - r rᵀ is the symmetric part of (w - r)(w + r)ᵀ: one product of matrices, which is not made of many
        experts.
        """
        weight, loss, experts = math.exp(log_weight), 0.0, len(bias_E)
        is_whole = experts <= MOST_EXPERTS_OF_WHOLE
        gradient_P, border_P, size_P = bias_E.new_zeros(3, experts + 1)
        products_PP = bias_E.new_zeros((experts + 1, experts + 1) if is_whole else (0, 0))
        spared_S, pairs_S = spare.curvature.pairs_S if spare else (), list[torch.Tensor]()
        for number, (evidence_EN, likelihood_EN) in enumerate(
            zip(self.evidence_SEN, self.likelihood_SEN, strict=True)
        ):
            w_EN = _weights(bias_E, weight, evidence_EN)
            r_EN = w_EN * likelihood_EN
            mixture_N = r_EN.sum(0)
            loss -= float(mixture_N.log().sum())
            r_EN.mul_(mixture_N.reciprocal_())
            # The last row is the mean of e under each.
            pair = spared_S[number] if spared_S else bias_E.new_empty(2, experts + 1, len(mixture_N))
            apart_PN, both_PN = pair
            apart_EN = torch.sub(w_EN, r_EN, out=apart_PN[:-1])
            both_EN = torch.add(w_EN, r_EN, out=both_PN[:-1])
            moved_EN = torch.mul(apart_EN, evidence_EN, out=r_EN)
            both_moved_EN = torch.mul(both_EN, evidence_EN, out=w_EN)
            torch.sum(moved_EN, 0, out=apart_PN[-1])
            torch.sum(both_moved_EN, 0, out=both_PN[-1])
            gradient_P += apart_PN.sum(1)
            border_P[:-1] += moved_EN.sum(1)
            border_P[-1] += torch.dot(moved_EN.flatten(), evidence_EN.flatten())
            if is_whole:
                products_PP.addmm_(apart_PN, both_PN.T)
                continue
            pairs_S.append(pair)
            size_P[:-1] += both_EN.sum(1)
            size_P[-1] += torch.dot(both_moved_EN.flatten(), evidence_EN.flatten())
            size_P[-1] -= pair[:, -1].square().sum() / 2
        loss = loss / self.count - self.best_logp
        curvature_PP = (products_PP + products_PP.T) / -2
        if is_whole:
            curvature_PP[:-1, :-1] += torch.diag(gradient_P[:-1])
            curvature_PP[-1] += border_P
            curvature_PP[:-1, -1] += border_P[:-1]
        for sum_P in (gradient_P, curvature_PP, border_P, size_P):
            sum_P /= self.count
        # By log β, where they were by β.
        gradient_P[-1] *= weight
        if is_whole:
            curvature_PP[-1] *= weight
            curvature_PP[:, -1] *= weight
            curvature_PP[-1, -1] += gradient_P[-1]
            return Slopes(loss, gradient_P, WholeCurvature(curvature_PP))
        border_P *= weight
        border_P[-1] = border_P[-1] * weight + gradient_P[-1]
        size_P[-1] = size_P[-1] * weight**2 + gradient_P[-1].abs()
        curvature = CurvatureProducts(pairs_S, gradient_P, border_P, size_P, weight, self.count)
        return Slopes(loss, gradient_P, curvature)

    def climb(self, start: Fit, fits_prior: bool, tolerance: float, steps: int = NEWTON_STEPS) -> Fit:
        """A maximum of the likelihood near a start, from which a step promises less than `tolerance` nats per
        token, or where `steps` end; β = exp(·) stays positive. Without `fits_prior`, β alone moves.

        Newton's method, damped, with negative curvature taken for positive: it leaves saddles.
        """
        bias_E, log_weight = start[0].clone(), math.log(start[1])
        moves = slice(0 if fits_prior else len(bias_E), len(bias_E) + 1)
        here, damping = self.slopes(bias_E, log_weight), FIRST_DAMPING
        for _ in range(steps):
            step_P = here.curvature.step(here.gradient_P, moves, damping)
            if -float(here.gradient_P[moves] @ step_P) < tolerance:
                break
            tried_E = bias_E + step_P[:-1] if fits_prior else bias_E
            tried_weight = log_weight + float(step_P[-1])
            there = self.slopes(tried_E, tried_weight, spare=here)
            if there.loss < here.loss:
                bias_E, log_weight, here = tried_E, tried_weight, there
                damping = max(damping / 10, LEAST_DAMPING)
            elif damping > MOST_DAMPING:
                break
            else:
                damping *= 100
                if here.curvature.pairs_S:  # written over by those of `there`
                    here = self.slopes(bias_E, log_weight, spare=there)
        return torch.log_softmax(bias_E, dim=0), math.exp(log_weight)


def _weights(bias_E: torch.Tensor, weight: float, evidence_EN: torch.Tensor) -> torch.Tensor:
    w_EN = torch.add(bias_E[:, None], evidence_EN, alpha=weight)
    w_EN.sub_(w_EN.amax(0)).exp_()
    return w_EN.mul_(w_EN.sum(0).reciprocal_())
