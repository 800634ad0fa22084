"""The ensemble of a plan or of a store, opened as an engine: which models, how they
are weighed, and their weights on a device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from btm_cluster.algorithm import Grown
from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.equations.gates import Gate
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import planned_ensemble
from btm_cluster.evaluation.fitting import fit_for
from btm_cluster.evaluation.systems import planned_method
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.model import load_model
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.operations.evaluate import TAKEN_OUT, check_text_is_known, find_grown
from btm_cluster.plan import Plan
from btm_cluster.steps.stored import open_config


def find_target(plan: Plan, target: str | None, driver: Driver) -> tuple[Grown, PreparedText | None]:
    """The forest as it stands, and the text that a mixture is for; None for a text of which nothing is known.

    Raises:
        UserError: no forest yet, or a target that is unknown or was taken out of it.
    """
    if target is not None:
        check_text_is_known(plan, target, driver.ledger)
    grown = find_grown(plan, driver)
    text = next((text for text in grown.prepared.texts if text.name == target), None)
    if target is not None and text is None:
        raise UserError(f"{target!r} was taken out of the forest", remedy=TAKEN_OUT)
    return grown, text


def planned_mixture(grown: Grown, text: PreparedText | None, driver: Driver) -> tuple[dict[str, Ref], Gate]:
    """The models that the plan mixes, by name, and how they are weighed for a text."""
    prepared = grown.prepared
    ensemble = planned_ensemble(prepared, grown.forest)
    method = planned_method(prepared.plan.merging, len(ensemble.models))
    return dict(ensemble.models), fit_for(prepared, ensemble, text, driver)[method]


def without_ruled_out(models: Mapping[str, Ref], gate: Gate) -> tuple[dict[str, Ref], Gate]:
    """The same without the models that the plan's `top_k` leaves out of a prior: they need not be loaded."""
    if not isinstance(gate, Mixing):
        return dict(models), gate
    kept = [j for j, share in enumerate(gate.log_prior_E.tolist()) if share > float("-inf")]
    named = list(models.items())
    return dict(named[j] for j in kept), replace(gate, log_prior_E=gate.log_prior_E[kept])


def open_engine(
    ledger: Ledger,
    models: Sequence[Ref],
    gate: Gate,
    tokenizer: TextTokenizer,
    block_tokens: int,
    rows: int = 1,
) -> EnsembleEngine:
    """Several models of one architecture loaded as one, which writes `rows`
    texts at a time, as their scores say.

    On a GPU where there is one, in float32: the ensemble that writes is then the one that was measured.

    Raises:
        UserError: the device has too little memory.
    """
    found = [ledger.get(model) for model in models]
    loaded = [
        load_model(open_config(ledger, one), ledger.open_file(one, "model.safetensors")) for one in found
    ]
    settings = EngineSettings(
        first_token=tokenizer.first_token,
        vocabulary=tokenizer.vocabulary,
        block_tokens=block_tokens,
        end_of_text=tokenizer.end_of_text,
        rows=rows,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return EnsembleEngine(loaded, gate, settings, tokenizer.decode_continuation)
