"""Mixtures of experts as their architectures are published: a tensor for each matrix of each expert.

transformers holds, and a store has, one stacked tensor for all experts of a layer. vLLM and most other
programs read the published form; so does transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import Header, header_of, names_in_order


@dataclass(frozen=True)
class Names:
    """How an architecture calls a layer's experts, and the three matrices of one."""

    experts: str
    gate: str
    up: str
    down: str


_MIXTRAL = Names("block_sparse_moe", "w1", "w3", "w2")
_QWEN = Names("mlp", "gate_proj", "up_proj", "down_proj")
PUBLISHED: Mapping[str, Names] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "flex_olmo": _QWEN,
    "olmoe": _QWEN,
}
"""By model type."""
_STACKED = {".mlp.experts.gate_up_proj": ("gate", "up"), ".mlp.experts.down_proj": ("down",)}


@dataclass(frozen=True)
class _Place:
    """Where a published tensor lies: a stored one, or a part of its matrix for one expert."""

    stored: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def published(weights: StoredWeights, model_type: str) -> StoredWeights:
    """The weights of a model as its architecture is published; those of a dense model as they are."""
    return PublishedWeights(weights, PUBLISHED[model_type]) if model_type in PUBLISHED else weights


class PublishedWeights:
    """The tensors of a stored mixture, cut into those that are published. Reading one reads the stacked tensor
    that it is in, which is a view where a file is mapped."""

    def __init__(self, stacked: StoredWeights, names: Names) -> None:
        self._stacked = stacked
        header = stacked.header
        self._places = {
            published: place
            for name in names_in_order(header)
            for published, place in _places(name, header[name]["shape"], names)
        }
        entries = {}
        for published, place in self._places.items():
            stored = header[place.stored]
            shape = stored["shape"]
            if place.expert is not None:
                shape = [shape[1] // place.parts, *shape[2:]]
            entries[published] = {"dtype": stored["dtype"], "shape": shape}
        self._header = header_of(entries, entries)

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A published tensor."""
        place = self._places[name]
        tensor = self._stacked.read(place.stored)
        if place.expert is not None:
            tensor = tensor[place.expert].chunk(place.parts)[place.part]
        return tensor.to(device)

    def __str__(self) -> str:
        return str(self._stacked)


def _places(name: str, shape: Sequence[int], names: Names) -> Iterator[tuple[str, _Place]]:
    """The published tensors that a stored one has, by name."""
    ending = next((ending for ending in _STACKED if name.endswith(ending)), None)
    layer, is_in_layer, rest = name.partition(".mlp.")
    if ending is None:
        yield f"{layer}.{names.experts}.{rest}" if is_in_layer else name, _Place(name)
        return
    matrices = [getattr(names, matrix) for matrix in _STACKED[ending]]
    for expert in range(shape[0]):
        for part, matrix in enumerate(matrices):
            called = f"{layer}.{names.experts}.experts.{expert}.{matrix}.weight"
            yield called, _Place(name, expert, part, len(matrices))
