"""LoRA experts of one base that read on together: one pass of the base, in which each row has its own expert's
adapter.

To read a token on, a model's weights are read once, whatever the number of rows. So eight experts that share a base
take about the time of one. Each keeps its module tree for whatever reads more than one token.

E experts of a stack, R rows, D and O widths of a linear layer before and after, r rank.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

MOST_STACKED = 32
"""Experts of a stack at most."""


@dataclass(frozen=True)
class Stack:
    """Experts that read on in one pass."""

    experts: tuple[int, ...]
    """Their places among all models."""
    model: PreTrainedModel
    """Reads one token of each row and expert: of the first row by each expert, then of the second row, and so on."""
    form: Any = None
    """The base, and names, shapes and types of the adapters: equal for stacks that compute alike."""


def alone(models: Sequence[PreTrainedModel]) -> list[Stack]:
    """Each model by itself."""
    return [Stack((place,), model) for place, model in enumerate(models)]


def stacked(models: Sequence[PreTrainedModel]) -> list[Stack]:
    """Adapters that are alike over the very same base together, any other model by itself.

    The models' adapters become parts of their stack's, which takes no memory beside them.
    """
    places: dict[Any, list[int]] = {}
    for place, model in enumerate(models):
        form = _form(model)
        places.setdefault((place,) if form is None else form, []).append(place)
    groups = [
        (form, tuple(group[first : first + MOST_STACKED]))
        for form, group in places.items()
        for first in range(0, len(group), MOST_STACKED)
    ]
    return [
        Stack(group, (_lone if len(group) == 1 else _stack)([models[place] for place in group]), form)
        for form, group in groups
    ]


def _lone(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """A model by itself, whose adapter is no part of the stack of an earlier engine."""
    (model,) = models
    for layer in _adapters(model).values():
        for pair in (layer.lora_A, layer.lora_B):
            for one in pair.parameters():
                if one.untyped_storage().nbytes() > one.nbytes:
                    one.data = one.data.clone()
    return model


def _adapters(model: PreTrainedModel) -> dict[str, Any]:
    """PEFT's layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _form(model: PreTrainedModel) -> tuple[Any, ...] | None:
    """The base, and names, shapes and types of the adapters; None of a model without adapters, or with some that are
    not of linear layers."""
    layers = _adapters(model)
    if not layers:
        return None
    from peft.tuners.lora import Linear  # it is loaded already

    if not all(isinstance(layer, Linear) for layer in layers.values()):
        return None
    own = {id(parameter) for layer in layers.values() for parameter in _matrices(layer)}
    base = tuple(id(tensor) for tensor in model.parameters() if id(tensor) not in own)
    shapes = tuple(
        (name, layer.scaling["default"], *((one.shape, one.dtype) for one in _matrices(layer)))
        for name, layer in layers.items()
    )
    return base, shapes


def _matrices(layer: Any) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _stack(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    tensors: Iterable[torch.Tensor] = (*models[0].parameters(), *models[0].buffers())
    model = copy.deepcopy(models[0], {id(tensor): tensor for tensor in tensors})
    layers = [_adapters(each) for each in models]
    for name in layers[0]:
        model.set_submodule(name, _StackedLayer([of_one[name] for of_one in layers]))
    return model


class _StackedLayer(torch.nn.Module):
    """A linear layer with an adapter for each expert. Takes one token of each row and expert."""

    a_ErD: torch.Tensor
    b_EOr: torch.Tensor

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.base_layer = layers[0].base_layer
        self._scale: float = layers[0].scaling["default"]
        for name, own in (("a_ErD", "lora_A"), ("b_EOr", "lora_B")):
            matrices = [getattr(layer, own)["default"] for layer in layers]
            whole = torch.stack([one.weight.data for one in matrices])
            self.register_buffer(name, whole, persistent=False)
            for one, part in zip(matrices, whole, strict=True):
                one.weight.data = part

    @property
    def weight(self) -> torch.Tensor:
        """The base's, of which some architectures ask the type."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    def forward(self, taken: torch.Tensor) -> torch.Tensor:
        given: torch.Tensor = self.base_layer(taken)
        taken_ERD = taken.reshape(-1, len(self.a_ErD), taken.shape[-1]).transpose(0, 1)
        added_ERO = taken_ERD.to(self.a_ErD.dtype) @ self.a_ErD.mT @ self.b_EOr.mT
        added = added_ERO.transpose(0, 1).reshape(given.shape) * self._scale
        return given + added.to(given.dtype)
