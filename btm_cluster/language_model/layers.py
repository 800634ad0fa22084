"""The layers of any transformers model, and what is done layer by layer: recomputing activations, compiling; and the
precision of what they hand on.

Both wrap a layer's `forward` and leave the module as it is, with its names and hooks: those of sharding run
outside of what is compiled or recomputed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from btm_cluster.language_model.model import has_dropout


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model, in order: the elements of its outermost lists of modules that have parameters."""
    return list(dict.fromkeys(layer for layer in _in_lists(model) if any(True for _ in layer.parameters())))


def _in_lists(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _in_lists(child)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keeps each layer's input alone for the backward pass, which computes the layer once more.

    Source: Chen et al., 2016, "Training deep nets with sublinear memory cost".
    """
    draws = has_dropout(model)  # else no random state is kept, which a GPU would be waited for
    for layer in layers_of(model):
        layer.forward = _recomputed(layer.forward, draws)


def _recomputed(forward: Any, draws: bool) -> Any:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    return recomputed


def hand_on_in_bfloat16(model: PreTrainedModel) -> None:
    """Has hidden states between layers in bfloat16, as sharded models have them. Autocast leaves them in float32,
    since embeddings are, and each layer adds to what it reads.

    The first layer's input is cast, and not the embeddings, from which rotary positions take their precision.
    """
    for first in layers_of(model)[:1]:
        first.forward = _read_in_bfloat16(first.forward)


def _read_in_bfloat16(forward: Any) -> Any:
    def reads_bfloat16(*args: Any, **kwargs: Any) -> Any:
        hidden_states, *others = args or (None,)
        if isinstance(hidden_states, torch.Tensor) and hidden_states.is_floating_point():
            args = (hidden_states.to(torch.bfloat16), *others)
        return forward(*args, **kwargs)

    return reads_bfloat16


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer by itself: what lies between, such as gathering its weights, stays outside."""
    config: Any = torch._dynamo.config
    layers = layers_of(model)
    # One code is compiled for all layers alike; where they differ, each may need its own.
    config.recompile_limit = max(config.recompile_limit, 2 * len(layers))
    # It would cut a layer's graph in parts, and refuses recomputed ones: layers are its parts already.
    config.optimize_ddp = False
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)


def units_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The parts of a model whose weights are needed one after the other: its layers, and where they are two
    matrices, its embeddings and its output matrix. What is left belongs to the whole."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    are_tied = last is None or first.weight is last.weight
    return [*layers_of(model), *([] if are_tied else [first, last])]
