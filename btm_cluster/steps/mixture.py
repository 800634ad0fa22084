"""The ensemble of a forest version as it is used: which models, how they are weighed,
and what they read; opened as an engine.

Plans, with their fitted mixtures, are read in operations/ensemble.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.equations.gates import Gate
from btm_cluster.equations.posterior import uniform_prior
from btm_cluster.errors import UserError
from btm_cluster.forest import Forest
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.versions import version_of
from btm_cluster.mixing.fitting import FULL, Mixing
from btm_cluster.steps.shared_models import SharedModels


@dataclass(frozen=True)
class Mixture:
    """The models of a forest version by name, and how they are weighed. A record of a few kB."""

    version: int
    """The forest's."""
    domains: tuple[str, ...]
    """Those that have an expert in that version."""
    models: Mapping[str, Ref]
    """By domain, and by name where another model mixes with the experts; in the gates' order."""
    tokenizer: Ref
    block_tokens: int
    gate: Gate
    """How models are weighed where nothing else is asked for."""
    gates: Mapping[str, Gate] = field(default_factory=dict)
    """How they are weighed for a text, by its name; of the same form as `gate`."""

    def without_ruled_out(self) -> "Mixture":
        """The same without models that no gate gives any weight, by the plan's
        `top_k`: to generate, they need not be loaded."""
        gates = [gate for gate in (self.gate, *self.gates.values()) if isinstance(gate, Mixing)]
        if len(gates) <= len(self.gates):  # one looks at all models, whatever their weights
            return self
        allowed_E = torch.stack([gate.log_prior_E for gate in gates]).amax(dim=0) > -torch.inf
        narrowed = [replace(gate, log_prior_E=gate.log_prior_E[allowed_E]) for gate in gates]
        return replace(
            self,
            models=dict(named for named, kept in zip(self.models.items(), allowed_E, strict=True) if kept),
            gate=narrowed[0],
            gates=dict(zip(self.gates, narrowed[1:], strict=True)),
        )


def mixture_of_store(ledger: Ledger, version: int | None = None) -> Mixture:
    """A version of the forest in a store, by default the newest, mixed by the paper's
    posterior: all experts alike before a text begins.

    Raises:
        UserError: there is no forest in the store, no such version, or it has no expert.
    """
    forest = forest_with_experts(ledger, version)
    models = {expert.domain: Ref("model", expert.identity) for expert in forest.experts}
    foundation = forest.foundation
    gate = Mixing(uniform_prior(torch.zeros(len(models), dtype=torch.float64)), FULL)
    tokenizer = Ref("tokenizer", foundation.tokenizer)
    return Mixture(forest.version, forest.domains, models, tokenizer, foundation.block_tokens, gate)


def newer_in_store(ledger: Ledger, served: int) -> Mixture | None:
    """The newest version of the forest in a store, unless it is the one that is served."""
    versions = ledger.log.versions()
    return None if not versions or versions[-1] == served else mixture_of_store(ledger)


def forest_with_experts(ledger: Ledger, version: int | None = None) -> Forest:
    """A version of the forest, by default the newest.

    Raises:
        UserError: there is no forest, no such version, or it has no expert.
    """
    forest = ledger.log.newest() if version is None else version_of(ledger, version)
    if forest is None or not forest.experts:
        found = "no forest" if forest is None else f"forest version {forest.version}, {forest.reason}"
        raise UserError(
            f"there is no forest with experts in {ledger.storage.location}",
            found=found,
            remedy="check the store's path, which is relative to this folder; `btm run` grows a forest",
        )
    return forest


def open_engine(
    ledger: Ledger,
    mixture: Mixture,
    tokenizer: TextTokenizer,
    rows: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    device: str | None = None,
) -> EnsembleEngine:
    """The mixture's models, all of one architecture, loaded into this process: on its
    GPU where there is one and no other `device` is named. What they share is held once.

    The engine continues `rows` texts at a time. `tokenizer` is the mixture's, opened. In float32, the ensemble
    that writes is the one that was measured.

    Raises:
        UserError: the device has too little memory.
    """
    shared = SharedModels(ledger, device or usual_device(), getattr(torch, precision))
    models = shared.open_each(mixture.models.values())
    return engine_of(models, mixture, tokenizer, rows, precision, device)


def usual_device() -> str:
    """The device that models write on where none is named: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def engine_of(
    models: Iterable[PreTrainedModel],
    mixture: Mixture,
    tokenizer: TextTokenizer,
    rows: int,
    precision: Literal["float32", "bfloat16"],
    device: str | None = None,
) -> EnsembleEngine:
    """The mixture's models as an engine, taken one after the other and moved to the
    device.

    Raises:
        UserError: the device has too little memory.
    """
    settings = EngineSettings(
        first_token=tokenizer.first_token,
        vocabulary=tokenizer.vocabulary,
        block_tokens=mixture.block_tokens,
        end_of_text=tokenizer.end_of_text,
        rows=rows,
        precision=precision,
        device=device or usual_device(),
    )
    return EnsembleEngine(models, mixture.gate, settings, tokenizer.decode_continuation)
