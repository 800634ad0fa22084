"""The sizes of a model in training, of which `memory.py` estimates its memory: by its configuration and what is
trained of it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from btm_cluster.language_model.attention import attends_by_kernels
from btm_cluster.language_model.deltas import freeze
from btm_cluster.language_model.demix import feed_forwards_of
from btm_cluster.language_model.layers import layers_of, units_of
from btm_cluster.language_model.lora import count_adapted, count_adapter
from btm_cluster.language_model.memory import ModelSize
from btm_cluster.language_model.model import fresh_on_meta
from btm_cluster.language_model.optimizer import hidden_parameters
from btm_cluster.plan import ALL, Trains


def size_for(model: Mapping[str, Any], trains: Trains = ALL, with_muon: bool = False) -> ModelSize:
    """The sizes of a model by its configuration, of which `trains` is trained; `with_muon`, by Muon."""
    size, hidden = _size_for(json.dumps(model, sort_keys=True), trains)
    return replace(size, by_muon=hidden) if with_muon else size


def count_by_muon(model: Mapping[str, Any], trains: Trains, with_muon: bool) -> int:
    """How many of the trained parameters of a model Muon trains, by its configuration."""
    return size_for(model, trains, with_muon).by_muon if with_muon else 0


@cache
def _size_for(model: str, trains: Trains) -> tuple[ModelSize, int]:
    """The sizes, and how many of the trained parameters are in matrices of the layers."""
    fresh = fresh_on_meta(json.loads(model))
    size = size_of(fresh, trains)
    if trains.lora is not None:
        return size, 0
    freeze(fresh, trains, random_seed=0)
    return size, sum(p.numel() for p in hidden_parameters(fresh) if p.ndim == 2)


def size_of(model: PreTrainedModel, trains: Trains = ALL) -> ModelSize:
    """The sizes of a model without an adapter, of which `trains` is to be trained; values are not needed."""
    width, heads = _field(model, "hidden_size", 1), _field(model, "num_attention_heads", 1)
    per_head = _field(model, "head_dim", width // heads)
    layers = layers_of(model)
    inner = _field(model, "intermediate_size", _field(model, "n_inner", 4 * width))
    units = [sum(p.numel() for p in unit.parameters()) for unit in units_of(model)]
    whole = sum(p.numel() for p in model.parameters())
    return ModelSize(
        parameters=whole + _adapter(model, trains),
        largest_unit=max([whole - sum(units), *units]),
        layers=len(layers),
        width=width,
        queries=per_head * heads,
        keys=per_head * _field(model, "num_key_value_heads", heads),
        inner=inner,
        is_gated=bool(layers) and sum(p.ndim == 2 and inner in p.shape for p in layers[0].parameters()) > 2,
        vocabulary=_field(model, "vocab_size", 1),
        eager_heads=0 if attends_by_kernels(model) else heads,
        **_trained(model, trains),
    )


def _adapter(model: PreTrainedModel, trains: Trains) -> int:
    return 0 if trains.lora is None else count_adapter(trains.lora, model)


def _trained(model: PreTrainedModel, trains: Trains) -> dict[str, int]:
    """Fields of a size that follow from the trained part: `cast` to `adapters`.

    As `deltas.hold_frozen_in` has it: frozen linear maps are in the forward pass's precision, but for one that is
    tied to the embeddings.
    """
    whole = sum(p.numel() for p in model.parameters())
    linear = sum(_linear_parameters(layer) for layer in layers_of(model))
    output = model.get_output_embeddings()
    head = 0 if output is None else sum(p.numel() for p in output.parameters())
    is_tied = output is None or output.weight is model.get_input_embeddings().weight
    if not trains.is_delta:
        return {"cast": linear, "cast_head": head}
    frozen_head, cast_head = (0, head) if is_tied else (head, 0)
    if trains.lora is not None:
        adapters = trains.lora.rank * count_adapted(trains.lora, model) // max(1, len(layers_of(model)))
        adapter = count_adapter(trains.lora, model)
        held = {"frozen": whole, "frozen_linear": linear + frozen_head}
        return {"cast": adapter, "cast_head": cast_head, **held, "adapters": adapters}
    parts = feed_forwards_of(model).values()
    trained = sum(p.numel() for part in parts for p in part.parameters())
    cast = sum(map(_linear_parameters, parts))
    held = {"frozen": whole - trained, "frozen_linear": linear - cast + frozen_head}
    return {"cast": cast, "cast_head": cast_head, **held}


def _linear_parameters(module: torch.nn.Module) -> int:
    linear = [one for one in module.modules() if isinstance(one, torch.nn.Linear | Conv1D)]
    return sum(p.numel() for one in linear for p in one.parameters(recurse=False))


def _field(model: PreTrainedModel, name: str, default: int) -> int:
    """A number of a configuration, which not every architecture has, or has as one number."""
    value = getattr(model.config.get_text_config(), name, None)
    return value if isinstance(value, int) and value > 0 else default
