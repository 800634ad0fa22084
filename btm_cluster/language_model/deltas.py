"""Experts as deltas: what is trained of a model, what is frozen, and the files that hold what changed.

The frozen part is held in the forward pass's precision; what is trained, in float32.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from btm_cluster.errors import IncompatibleError, PlanError
from btm_cluster.language_model.adapter_files import ADAPTER_FILE, stored_name
from btm_cluster.language_model.demix import feed_forwards_of
from btm_cluster.language_model.lora import add_adapter, count_adapter, resolve_lora
from btm_cluster.language_model.model import fill, fresh_on_meta, fresh_without_values, name_tensors
from btm_cluster.language_model.sharding import take_own
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import WEIGHTS, names_in_order
from btm_cluster.plan import ALL, BranchingPlan, LoraPlan, Part, Trains

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES: Mapping[Part, str] = {"all": WEIGHTS, "feed-forward": "delta.safetensors", "lora": ADAPTER_FILE}
"""The file of a stored model's weights, by what was trained of them."""


def trains_of(branching: BranchingPlan, model: Mapping[str, Any]) -> Trains:
    """The weights of a model that a plan's experts train, by its configuration.

    Raises:
        PlanError: the model has no such part, or it cannot be adapted so.
    """
    if branching.train == "lora":
        return Trains("lora", resolve_lora(branching.lora or LoraPlan(), model))
    if branching.train == "feed-forward":
        if not feed_forwards_of(fresh_on_meta(model)):
            raise PlanError(
                f"branching.train: the feed-forwards of a {model['model_type']} cannot be found",
                found="no submodule `mlp` in its layers",
                expected="decoder layers with a feed-forward called `mlp`, as in gpt2, llama or qwen2",
                remedy="take `train: lora` or `train: all`",
            )
        return Trains("feed-forward")
    return ALL


def count_trained(model: Mapping[str, Any], trains: Trains) -> tuple[int, int]:
    """How many parameters are trained of a model, by its configuration, and so stored; and how many are frozen."""
    return _count(json.dumps(model, sort_keys=True), trains)


@cache
def _count(model: str, trains: Trains) -> tuple[int, int]:
    fresh = fresh_on_meta(json.loads(model))
    whole = sum(parameter.numel() for parameter in fresh.parameters())
    if trains.lora is not None:
        return count_adapter(trains.lora, fresh), whole
    if trains.part == "all":
        return whole, 0
    own = sum(p.numel() for mlp in feed_forwards_of(fresh).values() for p in mlp.parameters())
    return own, whole - own


def freeze(model: "PreTrainedModel", trains: Trains, random_seed: int) -> None:
    """Freezes all of `model` that is not trained, in place; with LoRA, a fresh adapter is what is trained."""
    if trains.lora is not None:
        add_adapter(model, trains.lora, random_seed)
    elif trains.part == "feed-forward":
        model.requires_grad_(False)
        for mlp in feed_forwards_of(model).values():
            mlp.requires_grad_(True)


def hold_frozen_in(model: "PreTrainedModel", precision: str) -> None:
    """Holds the frozen linear layers in the precision in which they are multiplied.

    Embeddings and norms stay float32, as autocast has them: a forward pass gives the same bits as one with all
    weights in float32.
    """
    if precision == "float32":
        return
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) not in embeddings:
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


def load_base(
    config: Mapping[str, Any],
    base: StoredWeights,
    trains: Trains,
    random_seed: int,
    precision: str,
    device: torch.device | str,
) -> "PreTrainedModel":
    """A stored model of which a part is trained: frozen, and held in the precision of a forward pass, before it is
    loaded.

    Memory: the model, of which the frozen linear layers may be in 16 bits, and one tensor as it is stored.

    Raises:
        IncompatibleError: weights of another model.
    """
    model = fresh_without_values(config)
    if trains.lora is None:
        freeze(model, trains, random_seed)
    else:
        model.requires_grad_(False)
    hold_frozen_in(model, precision)
    fill(model, base, device)
    if trains.lora is not None:
        freeze(model, trains, random_seed)
    return model


def trained_names(model: "PreTrainedModel", trains: Trains) -> dict[str, str]:
    """The names that parameters in training are stored by, by their names in the model."""
    names = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: stored_name(name) if trains.lora is not None else name for name in names}


def load_trained(model: "PreTrainedModel", trains: Trains, weights: StoredWeights) -> None:
    """Loads what was stored of a training into what is trained of `model`.

    Raises:
        IncompatibleError: naming tensors that are missing, unexpected or of another shape.
    """
    parameters, names = dict(model.named_parameters()), trained_names(model, trains)
    there = {*names_in_order(weights.header)}
    shapes = {stored: list(parameters[name].shape) for name, stored in names.items()}
    wrong = {
        "missing": sorted(shapes.keys() - there),
        "unexpected": sorted(there - shapes.keys()),
        "of another shape": [
            n for n in sorted(there & shapes.keys()) if weights.header[n]["shape"] != shapes[n]
        ],
    }
    if found := name_tensors(wrong):
        raise IncompatibleError(
            f"{weights} does not fit the model",
            found=found,
            expected="exactly the tensors that are trained",
            remedy="use the versions of transformers and peft by which it was stored",
        )
    for name, stored in names.items():
        take_own(parameters[name], weights.read(stored))
