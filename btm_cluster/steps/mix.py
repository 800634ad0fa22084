"""Mixes several models' scores of one split of a text by every method of a fit."""

import numpy as np
import torch

from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing.fit_file import SUMS, open_fits
from btm_cluster.mixing.fitting import Mixing, one_thread_each
from btm_cluster.mixing.scores import ScoreStack
from btm_cluster.requests import MixText
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.storage.scratch import scratch_folder


def mix(request: MixText, ledger: Ledger, control: Control) -> Artifact:
    """Writes `sums.npy`, float64 [methods, U, D]: summed log-probability by document, for
    each method of the fit in order."""
    with one_thread_each() as threads, scratch_folder() as scratch:
        fits = open_fits(ledger, ledger.get(request.fit))
        stack = ScoreStack.of(ledger, request.scored, threads)
        counter = Counter(control, request.label, "mixing", len(fits), "methods")
        sums = [
            stack.mixture_sums(fit.log_prior_E, fit.posterior)
            if isinstance(fit, Mixing)
            else stack.gated_sums(fit)
            for fit in counter.over(fits.values())
        ]
        np.save(scratch / SUMS, torch.stack(sums).numpy())
        return ledger.commit(request, {SUMS: scratch / SUMS}, {})
