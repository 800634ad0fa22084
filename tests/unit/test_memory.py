"""The estimate of a training's memory, and what follows from it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm_cluster.language_model.activations import quicken_gelu
from btm_cluster.language_model.attention import leave_causal_masks_out
from btm_cluster.language_model.deltas import freeze, hold_frozen_in
from btm_cluster.language_model.layers import hand_on_in_bfloat16
from btm_cluster.language_model.memory import ModelSize, PassSettings, choose_settings, memory_of
from btm_cluster.language_model.model import fresh_on_meta
from btm_cluster.language_model.training_size import size_of
from btm_cluster.plan import ALL, Lora, Trains

QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
GB = 1e9


@pytest.fixture(scope="module")
def size() -> ModelSize:
    return size_of(fresh_on_meta(QWEN_7B))


@pytest.fixture
def settings() -> PassSettings:
    """Two H200 that read 8,192 tokens at once each."""
    return PassSettings(ranks=2, blocks=2, block_tokens=4096, in_bfloat16=True, compiles=True)


def test_sizes_are_read_off_a_model(size: ModelSize) -> None:
    assert size == ModelSize(
        parameters=7_615_616_512,
        largest_unit=152_064 * 3584,
        layers=28,
        width=3584,
        queries=3584,
        keys=512,
        inner=18_944,
        is_gated=True,
        vocabulary=152_064,
        cast=28 * (2 * 3584 * (3584 + 512) + 3584 + 2 * 512 + 3 * 3584 * 18_944),
        cast_head=152_064 * 3584,
    )


def test_a_state_is_sixteen_bytes_for_each_trained_parameter_and_two_for_each_frozen_one(
    size: ModelSize, settings: PassSettings
) -> None:
    parameters = size.parameters
    assert memory_of(size, settings).state == 16 * parameters
    assert memory_of(size, replace(settings, is_sharded=True)).state == 8 * parameters
    frozen = replace(size, frozen=parameters - 1000, frozen_linear=parameters - 1000)
    assert memory_of(frozen, settings).state == 2 * (parameters - 1000) + 16 * 1000


@pytest.mark.parametrize(
    ("gigabytes", "ranks", "sharding", "recomputing", "expected"),
    [
        (300, 2, "auto", "auto", (False, False)),
        (127, 2, "auto", "auto", (True, False)),
        (80, 2, "auto", "auto", (True, True)),
        (80, 8, "auto", "auto", (True, False)),
        (80, 1, "auto", "auto", (False, True)),  # the least that one alone can take, which is too much
        (127, 2, "off", "auto", (False, True)),
        (300, 2, "on", "on", (True, True)),
        (80, 2, "on", "off", (True, False)),
    ],
)
def test_the_fastest_way_that_fits_is_taken(
    size: ModelSize,
    settings: PassSettings,
    gigabytes: float,
    ranks: int,
    sharding: Any,
    recomputing: Any,
    expected: Any,
) -> None:
    chosen = choose_settings(size, replace(settings, ranks=ranks), gigabytes * GB, sharding, recomputing)
    assert (chosen.is_sharded, chosen.recomputes) == expected


@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize(("model_type", "most_above"), [("gpt2", 1.02), ("llama", 1.26)])
def test_a_layer_keeps_as_much_as_autograd_says(
    model_type: str, most_above: float, in_bfloat16: bool
) -> None:
    """Llama's norms, in pieces where they are not compiled, keep some more than the formula has."""
    settings = PassSettings(1, 2, 256, in_bfloat16, compiles=False, is_sharded=True)
    of_three, of_two = (_model(model_type, layers, in_bfloat16) for layers in (3, 2))
    kept = _kept_bytes(of_three) - _kept_bytes(of_two)
    estimate = (
        memory_of(size_of(of_three), settings).activations - memory_of(size_of(of_two), settings).activations
    )
    assert estimate < kept < most_above * estimate


@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_eager_attention_keeps_as_much_of_its_scores_as_autograd_says(in_bfloat16: bool) -> None:
    """Of one layer, read off blocks of two lengths: what grows with their square."""
    kept, estimates = [], []
    model = _model("gemma2", 1, in_bfloat16)
    assert size_of(model).eager_heads == 4
    for tokens in (128, 256):
        settings = PassSettings(1, 2, tokens, in_bfloat16, compiles=False, is_sharded=True)
        estimates.append(memory_of(size_of(model), settings).activations)
        kept.append(_kept_bytes(model, tokens))
    square = estimates[1] - 2 * estimates[0]
    assert square == 2 * 4 * 8 * (256**2 - 2 * 128**2)
    assert kept[1] - 2 * kept[0] == pytest.approx(square, rel=0.01)


def test_scores_are_kept_of_each_layer_or_of_one_where_the_others_are_computed_twice(size: ModelSize) -> None:
    settings = PassSettings(1, 1, 4096, in_bfloat16=True, compiles=True)
    capped = replace(size, eager_heads=28)
    scores = 28 * 4096**2
    assert size.eager_heads == 0
    kept = memory_of(capped, settings).activations - memory_of(size, settings).activations
    assert kept == size.layers * scores * 8
    once = replace(settings, recomputes=True)
    assert memory_of(capped, once).activations - memory_of(size, once).activations == scores * 8


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("model_type", "train"), [("gpt2", "all"), ("llama", "all"), ("llama", "lora")])
def test_a_compiled_layer_keeps_as_much_as_the_partitioner_leaves(model_type: str, train: str) -> None:
    """With the copies of its weights that autocast makes."""
    settings = PassSettings(1, 2, 256, in_bfloat16=True, compiles=True)
    three, two = (_model(model_type, layers, in_bfloat16=False) for layers in (3, 2))
    trains = Trains("lora", Lora(4, 8.0, LINEAR)) if train == "lora" else ALL
    memory = [memory_of(size_of(model, trains), settings) for model in (three, two)]
    estimate = memory[0].activations + memory[0].copies - memory[1].activations - memory[1].copies
    kept = []
    for model in (three, two):
        freeze(model, trains, 0)
        if trains.is_delta:
            hold_frozen_in(model, "bfloat16")
        leave_causal_masks_out(model)
        quicken_gelu(model)
        hand_on_in_bfloat16(model)
        model.compile(backend="aot_eager_decomp_partition", dynamic=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept.append(_kept_bytes(model))
    assert kept[0] - kept[1] == pytest.approx(estimate, rel=0.03)


def _model(model_type: str, layers: int, in_bfloat16: bool) -> PreTrainedModel:
    shape = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 512}
    other = {
        "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "activation_function": "gelu"},
        "llama": {"num_key_value_heads": 2, "intermediate_size": 160},
        "gemma2": {"num_key_value_heads": 2, "intermediate_size": 160, "head_dim": 16},
    }[model_type]
    config = AutoConfig.for_model(model_type, bos_token_id=None, eos_token_id=None, **shape, **other)
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    eager = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    return model


def _kept_bytes(model: PreTrainedModel, tokens: int = 256) -> int:
    """Bytes that a forward pass over 2 blocks keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(2, tokens, dtype=torch.int64), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())
