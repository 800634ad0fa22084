"""Fits of how models are mixed, as a file of an artifact: written and read by the
steps that fit and mix, and by whoever generates.

Knows no text and fits nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors.torch import load_file, save_file

from btm_cluster.equations.gates import Discounts, FixedShare
from btm_cluster.equations.learned_gate import LearnedGate
from btm_cluster.equations.posterior import Kind, Posterior
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.mixing.fitting import FULL, Mixing
from btm_cluster.requests import MixingMethod

Fitted: TypeAlias = Mixing | FixedShare | Discounts | LearnedGate
FIT_FILE = "fit.safetensors"
SUMS = "sums.npy"
"""The file of a mixture: summed log-probabilities by document, float64 [methods, U, D]."""


def write_fits(fits: Sequence[Fitted], path: Path) -> None:
    """Writes one fit per method, in order."""
    tensors = {f"{i}.{name}": value for i, fit in enumerate(fits) for name, value in _tensors(fit).items()}
    # Methods share some.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def open_fits(ledger: Ledger, artifact: Artifact) -> dict[MixingMethod, Fitted]:
    """The fits of an artifact, by method."""
    tensors, recipe = load_file(ledger.open_file(artifact, FIT_FILE)), artifact.recipe
    methods = [MixingMethod(**method) for method in recipe["methods"]]
    return {method: _read(method, _below(tensors, f"{i}."), recipe) for i, method in enumerate(methods)}


def _tensors(fit: Fitted) -> dict[str, torch.Tensor]:
    values = (
        {"log_prior_E": fit.log_prior_E, "weight": fit.posterior.weight}
        if isinstance(fit, Mixing)
        else vars(fit)
    )
    return {
        name: value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in values.items()
        if value is not None
    }


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read(method: MixingMethod, tensors: Mapping[str, torch.Tensor], recipe: Mapping[str, Any]) -> Fitted:
    if method.posterior == "gate":
        return LearnedGate(**tensors)
    prior_E = tensors["log_prior_E"]
    if method.posterior == "discounts":
        return Discounts(prior_E, tuple(tensors["discounts"].tolist()), tensors["weights_G"])
    if method.posterior == "fixed-share":
        return FixedShare(prior_E, float(tensors["switching_rate"]), float(tensors["temperature"]))
    kind = FULL.kind if method.posterior == "none" else method.posterior
    return Mixing(
        prior_E,
        Posterior(cast(Kind, kind), recipe["window_tokens"], recipe["discount"], float(tensors["weight"])),
    )
