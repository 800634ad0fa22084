"""How a text mixes the experts: priors and posteriors, fitted on development blocks in hash order.

Stands between the formulas and whoever has scores: knows of plans and log-probabilities, not of models, texts
or the store.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from btm_cluster.equations.calibration import calibrate
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.perplexity import perplexity
from btm_cluster.equations.posterior import Kind, Posterior, PriorKind, keep_top, log_posterior, log_prior
from btm_cluster.equations.running import RunningGate, running_posterior
from btm_cluster.plan import MergingPlan

FULL = Posterior("full")
AT_ONCE = 8
"""At most: each holds a text's development blocks under all experts, several times over."""
PosteriorName = Kind | Literal["none"]


@dataclass(frozen=True)
class Mixing:
    """How one target mixes the experts: a log-prior [E] and a posterior, fitted on its development blocks."""

    log_prior_E: torch.Tensor
    posterior: Posterior

    def log_weights(self, logp_EBT: torch.Tensor, entropy_EBT: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """As a gate gives them: log p(D=j | x_<t), [E, B, T]."""
        return log_posterior(logp_EBT, self.log_prior_E, self.posterior)

    def running(self) -> RunningGate:
        """The same weights, token by token."""
        return running_posterior(self.log_prior_E, self.posterior)


def cross_fitted_perplexity(logp_EBT: torch.Tensor, mask_BT: torch.Tensor, merging: MergingPlan) -> float:
    """Perplexity of the ensemble on blocks, each half measured with the mixture
    that was fitted on the other half."""
    even_B = torch.arange(len(mask_BT)) % 2 == 0
    halves = [(even_B, ~even_B), (~even_B, even_B)] if len(mask_BT) > 1 else [(even_B, even_B)]
    total = 0.0
    for fitted_B, measured_B in halves:
        mixing = fit_planned(logp_EBT[:, fitted_B], mask_BT[fitted_B], merging)
        logp_BT = log_mixture(logp_EBT[:, measured_B], mixing.log_prior_E, mixing.posterior)
        total += float(logp_BT[mask_BT[measured_B]].sum())
    return float(perplexity(torch.tensor(total, dtype=torch.float64), mask_BT.sum()))


def fit_planned(logp_EBT: torch.Tensor, mask_BT: torch.Tensor, merging: MergingPlan) -> Mixing:
    """As the plan mixes; by the calibrated posterior where that is a gate."""
    if merging.posterior == "gate":
        return fit_mixing("calibrated", "fitted", logp_EBT, mask_BT, merging)
    mixing = fit_mixing(merging.posterior, merging.prior, logp_EBT, mask_BT, merging)
    return Mixing(keep_top(mixing.log_prior_E, merging.top_k), mixing.posterior)


def fit_mixing(
    posterior: PosteriorName,
    prior: PriorKind,
    logp_EBT: torch.Tensor,
    mask_BT: torch.Tensor,
    merging: MergingPlan,
) -> Mixing:
    """A posterior and its prior, fitted on development blocks.

    `none` sees no context: plain mixture weights.
    """
    if posterior == "none":
        return Mixing(log_prior(prior, logp_EBT, mask_BT, FULL), replace(FULL, weight=0.0))
    if posterior != "calibrated":
        form = Posterior(posterior, merging.window_tokens)
        return Mixing(log_prior(prior, logp_EBT, mask_BT, form), form)
    form = Posterior("calibrated", merging.window_tokens, merging.discount)
    given_E = None if prior == "fitted" else log_prior(prior, logp_EBT, mask_BT, FULL)
    return Mixing(*calibrate(logp_EBT, mask_BT, form, given_E))


def shared_mixing(samples: Sequence[tuple[torch.Tensor, torch.Tensor]], merging: MergingPlan) -> Mixing:
    """One setting for all texts: a uniform prior, and the evidence weight fitted
    on several texts' samples together."""
    logp_EBT = torch.cat([logp for logp, _ in samples], dim=1)
    return fit_mixing("calibrated", "uniform", logp_EBT, torch.cat([mask for _, mask in samples]), merging)


Item = TypeVar("Item")
Result = TypeVar("Result")


def each_in_one_thread(act: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The result for each item, a few at a time: each is too small for torch to spread it over several
    threads."""
    with one_thread_each(), ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(act, items))


class _OneThread:
    """Torch's number of threads, which is one while any thread of this process asks for it.

    Torch has a number for each thread that has computed already, and one for those that have not. Both are set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[int] = []
        self._before = 1

    def begin(self) -> int:
        """Sets it to one, and returns what it was before the first user."""
        with self._lock:
            if not self._users:
                self._before = torch.get_num_threads()
            self._users.append(threading.get_ident())
            torch.set_num_threads(1)
            return self._before

    def end(self) -> None:
        """Sets this thread's back, unless it has begun more than once; and that of new threads after the last."""
        user = threading.get_ident()
        with self._lock:
            self._users.remove(user)
            if user in self._users:
                return
            torch.set_num_threads(self._before)
            if self._users:  # from a thread that ends at once, for it would be that one's number too
                again = threading.Thread(target=torch.set_num_threads, args=(1,))
                again.start()
                again.join()


_ONE_THREAD = _OneThread()


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Torch without threads of its own, here and in threads that are started meanwhile. Yields how many it had.

    Uses may overlap and nest.
    """
    before = _ONE_THREAD.begin()
    try:
        yield before
    finally:
        _ONE_THREAD.end()
