"""What was fitted to mix experts by, as a file of an artifact: written by the verb *mix*, read by it and by `evaluation.py`.

Knows of no text and of no way to fit.
"""

from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file

from btm_cluster.equations.gates import Discounts, FixedShare
from btm_cluster.equations.learned_gate import LearnedGate, TextScores
from btm_cluster.equations.posterior import Posterior, uniform_prior
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing import Mixing
from btm_cluster.plan import MergingPlan

Fitted: TypeAlias = Mixing | FixedShare | Discounts | LearnedGate
FIT = "fit.safetensors"


def open_gate(ledger: Ledger, fit: Artifact) -> LearnedGate:
    """The gate that a fit for all, or one for a text, ended in."""
    return LearnedGate(**load_file(ledger.open_file(fit, FIT)))


def write_fit(fitted: Fitted, path: Path) -> None:
    """Everything but the prior, which is uniform over whatever experts a text is mixed from."""
    if isinstance(fitted, Mixing):
        tensors = {"weight": torch.tensor(fitted.posterior.weight, dtype=torch.float64)}
    elif isinstance(fitted, Discounts):
        tensors = {"discounts": torch.tensor(fitted.discounts, dtype=torch.float64), "weights": fitted.weights_G}
    else:
        tensors = {name: value for name, value in vars(fitted).items() if value is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_fit(posterior: str, path: Path, sample: TextScores, merging: MergingPlan) -> Fitted:
    """What `write_fit` wrote, for the experts of a text."""
    tensors, uniform_E = load_file(path), uniform_prior(sample.logp_EBT)
    if posterior == "calibrated":
        form = Posterior("calibrated", merging.window_tokens, merging.discount, float(tensors["weight"]))
        return Mixing(uniform_E, form)
    if posterior == "discounts":
        return Discounts(uniform_E, tuple(tensors["discounts"].tolist()), tensors["weights"])
    return LearnedGate(**tensors)
