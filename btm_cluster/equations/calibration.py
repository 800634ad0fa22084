"""The calibrated posterior, fitted: the log-prior and the weight of evidence under
which development blocks are likeliest.

N tokens of all blocks, beside the letters of the package.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from btm_cluster.equations.mixture_likelihood import NEWTON_STEPS, Fit, MixtureLikelihood
from btm_cluster.equations.posterior import Posterior, evidence, fitted_prior, uniform_prior

LBFGS_STEPS = 200
STARTING_TOKENS = 8192
"""Tokens, evenly spread, on which a fit is climbed from each start; it ends on all of them."""
STEPS_ON_FEW = 20
TOLERANCE = 1e-8
"""Nats per token that a further step must promise. A useless expert's weight goes to zero for ever, by less and less
gain."""
NEAR = 1e-3
"""Nats per token within which two fits are compared on all tokens, and not on the few."""
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
    evidence_EBT = evidence(logp_EBT, replace(posterior, kind="calibrated", weight=1.0))
    evidence_EN, logp_EN = _masked(evidence_EBT, mask_BT), _masked(logp_EBT, mask_BT)
    step = -(-logp_EN.shape[1] // STARTING_TOKENS)
    few = MixtureLikelihood.of(evidence_EN[:, ::step], logp_EN[:, ::step])
    fits_prior = log_prior_E is None
    plain_E = _plain_prior(logp_EN[:, ::step]) if log_prior_E is None else log_prior_E
    starts = _starts(plain_E, fits_prior)
    steps = NEWTON_STEPS if step == 1 else STEPS_ON_FEW
    best = min((few.climb(start, fits_prior, TOLERANCE, steps) for start in starts), key=few.loss)
    tokens = few
    if step > 1:
        tokens = MixtureLikelihood.of(evidence_EN, logp_EN)
        best = tokens.climb((_inner(best[0]), best[1]) if fits_prior else best, fits_prior, TOLERANCE)
        if fits_prior and tokens.loss(best) > tokens.loss((plain_E, 0.0)) - NEAR:
            plain_E = _plain_prior(logp_EN)
    if tokens.loss(best) > tokens.loss((plain_E, 0.0)) + GAIN_THAT_COUNTS:
        best = (plain_E, 0.0)
    return best[0], replace(posterior, kind="calibrated", weight=best[1])


def _masked(values_EBT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The values of real tokens [E, N]; not copied where all are real, as in most development blocks."""
    return values_EBT.flatten(1) if bool(mask_BT.all()) else values_EBT[:, mask_BT]


def _plain_prior(logp_EN: torch.Tensor) -> torch.Tensor:
    """The prior of the mixture without evidence, by EM: [E]."""
    everything = torch.ones(1, logp_EN.shape[1], dtype=torch.bool)
    return fitted_prior(logp_EN[:, None], everything, tolerance=GAIN_THAT_COUNTS / 10)


def _starts(plain_E: torch.Tensor, fits_prior: bool) -> list[Fit]:
    """Log-priors [E] and β from which the likelihood is climbed."""
    if not fits_prior:
        return [(plain_E, DEFAULT_EVIDENCE_WEIGHT), (plain_E, LITTLE_EVIDENCE_WEIGHT)]
    uniform_E = torch.log_softmax(torch.zeros_like(plain_E), dim=0)
    return [(uniform_E, DEFAULT_EVIDENCE_WEIGHT), (_inner(plain_E), LITTLE_EVIDENCE_WEIGHT)]


def _inner(log_prior_E: torch.Tensor) -> torch.Tensor:
    """A log-prior near another [E], away from the corners, where an expert's share has no slope to climb."""
    uniform_E = torch.log_softmax(torch.zeros_like(log_prior_E), dim=0)
    return torch.logaddexp(log_prior_E + math.log(0.9), uniform_E + math.log(0.1))


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
