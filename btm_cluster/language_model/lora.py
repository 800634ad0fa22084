"""Adapters of low rank (LoRA), in PEFT's layout: put beside linear layers, by name, and checked before that.

`peft` is imported where an adapter is put into a model, and not before: that takes two seconds.
"""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from btm_cluster.errors import PlanError, one_line
from btm_cluster.language_model.adapter_files import ADAPTER_NAME, stored_name
from btm_cluster.language_model.model import fresh_on_meta
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.plan import Lora, LoraPlan
from btm_cluster.plan.trains import ALL_LINEAR

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_IN_A_LAYER = re.compile(r"\.\d+\.")


def resolve_lora(plan: LoraPlan, model: Mapping[str, Any]) -> Lora:
    """The adapter that a plan asks for, of a model by its configuration.

    Raises:
        PlanError: a name that none of its linear layers has, a layer that PEFT adapts in no such model, or a
            rank above a layer's width.
    """
    modules = None if ALL_LINEAR in plan.modules else tuple(sorted({*plan.modules}))
    return _resolved(json.dumps(model, sort_keys=True), plan.rank, plan.alpha, modules)


@cache
def _resolved(model: str, rank: int, alpha: float, modules: tuple[str, ...] | None) -> Lora:
    fresh = fresh_on_meta(json.loads(model))
    layers = _linear_layers(fresh)
    modules = modules or tuple(sorted({name.rpartition(".")[2] for name in layers}))
    if not modules:
        raise _unknown_module(ALL_LINEAR, layers)
    matched = {module: [name for name in layers if _is_called(name, module)] for module in modules}
    for module, names in matched.items():
        if not names:
            raise _unknown_module(module, layers)
        name = min(names, key=lambda name: min(layers[name].weight.shape))
        narrowest = min(layers[name].weight.shape)
        if rank > narrowest:
            raise PlanError(
                "branching.lora.rank is above the width of a layer",
                found=f"rank {rank}, and {name} of {' × '.join(map(str, layers[name].weight.shape))}",
                expected=f"at most {narrowest}, where the adapter already holds any change of that layer",
                remedy="lower the rank, or leave such layers out of branching.lora.modules",
            )
    lora = Lora(rank, alpha, modules)
    _check_takes(fresh, lora)
    return lora


def _check_takes(fresh: "PreTrainedModel", lora: Lora) -> None:
    """Puts the adapter into a model without values, as training will into the real one."""
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(_config_for(lora, fresh), fresh, ADAPTER_NAME, low_cpu_mem_usage=True)
    except ValueError as exc:
        raise PlanError(
            f"branching.lora: PEFT adapts no {fresh.config.model_type} so",
            found=one_line(exc),
            expected="linear layers that PEFT adapts in such a model",
            remedy=f"name others in branching.lora.modules, of {', '.join(lora.modules)}, or take `train: all`",
        ) from exc


def _linear_layers(model: "PreTrainedModel") -> dict[str, torch.nn.Linear | Conv1D]:
    """Linear layers of the decoder layers, by name: all but the output layer."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and _IN_A_LAYER.search(name)
    }


def count_adapter(lora: Lora, model: "PreTrainedModel") -> int:
    """How many parameters an adapter of `model` has."""
    return sum(lora.rank * sum(layer.weight.shape) for layer in _adapted(lora, model))


def count_adapted(lora: Lora, model: "PreTrainedModel") -> int:
    """How many linear layers of `model` an adapter stands beside."""
    return len(_adapted(lora, model))


def _adapted(lora: Lora, model: "PreTrainedModel") -> list[torch.nn.Linear | Conv1D]:
    layers = _linear_layers(model).items()
    return [layer for name, layer in layers if any(_is_called(name, module) for module in lora.modules)]


def _is_called(name: str, module: str) -> bool:
    """Whether PEFT takes a layer's name for one of its `target_modules`."""
    return f".{name}".endswith(f".{module}")


def _unknown_module(module: str, layers: Mapping[str, torch.nn.Module]) -> PlanError:
    known = sorted({name.rpartition(".")[2] for name in layers})
    nearest = difflib.get_close_matches(module, known, n=1)
    return PlanError(
        "branching.lora.modules names no linear layer of the model",
        found=module,
        expected=f"some of {', '.join(known)}" if known else "a model whose layers have linear ones",
        remedy=f"did you mean `{nearest[0]}`?" if nearest else f"take one of these, or `{ALL_LINEAR}`",
    )


def add_adapter(model: "PreTrainedModel", lora: Lora, random_seed: int) -> None:
    """Puts a fresh adapter into `model`, in place, and freezes the rest. B is zero: nothing has changed yet.

    A is drawn from the random seed on the CPU, and is float32, whatever the layers are: the same on every device.
    Of a model without values, it has none.
    """
    from peft import inject_adapter_in_model

    device = model.device
    torch.manual_seed(random_seed)
    with nullcontext() if device.type == "meta" else _seen_as_float32_on_cpu(model):
        inject_adapter_in_model(_config_for(lora, model), model, ADAPTER_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


@contextmanager
def _seen_as_float32_on_cpu(model: "PreTrainedModel") -> Iterator[None]:
    """Has stand-ins that take no memory in place of a model's weights: PEFT takes the type and the device of a
    layer for its adapter."""
    held = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, _ in held:
            parameter.data = torch.zeros(()).expand(parameter.shape)
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


def put_adapter(model: "PreTrainedModel", lora: Lora, adapter: StoredWeights) -> None:
    """Puts a stored adapter into `model`, in place, in its type and on its device."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_config_for(lora, model), model, ADAPTER_NAME, low_cpu_mem_usage=True)
    for name in [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        owner, _, own = name.rpartition(".")
        tensor = adapter.read(stored_name(name)).to(model.device, model.dtype, copy=True)
        setattr(model.get_submodule(owner), own, torch.nn.Parameter(tensor, requires_grad=False))


def with_other_adapter(adapted: "PreTrainedModel", adapter: StoredWeights) -> "PreTrainedModel":
    """A model that shares all but the adapter with `adapted`, and has a stored one of the same form instead: a copy of
    the module tree, which is faster than `put_adapter`."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*adapted.parameters(), *adapted.buffers())}
    for name, parameter in adapted.named_parameters():
        if f".{ADAPTER_NAME}." in name:
            tensor = adapter.read(stored_name(name)).to(parameter.device, parameter.dtype, copy=True)
            kept[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(adapted, kept)


def adapter_config(lora: Lora, model: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """PEFT's adapter_config.json. `base` is the folder, or the name on the hub, of the model adapted.

    Without the version of peft: a forest outlives several.
    """
    fields = _config_for(lora, fresh_on_meta(model)).to_dict()
    fields.pop("peft_version", None)
    named = {"base_model_name_or_path": base, "inference_mode": True, "target_modules": list(lora.modules)}
    return {**fields, "peft_type": "LORA", "task_type": "CAUSAL_LM", **named}


def _config_for(lora: Lora, model: "PreTrainedModel") -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # as PEFT itself writes it
        target_modules=list(lora.modules),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in _adapted(lora, model)),
    )
