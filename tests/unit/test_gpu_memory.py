"""Trainings that fit the memory of GPUs, and the settings by which others would."""

from dataclasses import replace
from typing import Any

import pytest

from btm_cluster.driver.capacity import Demand, memory_problem
from btm_cluster.driver.gpu_memory import TrainingMemory, problem_of, told
from btm_cluster.equations.budget import trained_bytes
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.training_size import size_for
from btm_cluster.plan import BranchingPlan, Lora, Trains
from btm_cluster.requests import Resources
from tests.progress_steps import training
from tests.unit.test_memory import GB, QWEN_7B

LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
LORA = BranchingPlan.model_validate({"train": "lora"})


def expert(model: dict[str, Any] = LLAMA_1B, **how: Any) -> TrainingMemory:
    """An expert that reads 16 blocks of 2,048 tokens in each update, 8 at once."""
    alone = Resources(1, 1.0, 1, 8, "bfloat16", True, "none", "off")
    resources = replace(alone, **how)
    return TrainingMemory(size_for(model), resources, 16, 2048, is_expert=True)


def remedy(training: TrainingMemory, gigabytes: float) -> str:
    problem = problem_of("an expert", training, gigabytes * GB)
    assert problem is not None
    return str(problem.remedy)


def test_the_estimate_of_a_billion_parameters_is_told_with_its_parts() -> None:
    said = told(expert(), 141 * GB)
    peak = expert().memory(None).peak / GB
    assert said.startswith(
        f"about {peak:.1f} GB of 141.0 GB at its peak on each GPU (weights 4.9, gradients 4.9"
    )
    assert 45 < peak < 55
    assert "activation checkpointing" in told(expert(activation_checkpointing="auto"), 40 * GB)


@pytest.mark.parametrize(
    ("gigabytes", "how", "setting"),
    [
        (40, {}, "`cluster.micro_batch_blocks: 4`"),
        (30, {}, "`cluster.micro_batch_blocks: 2`"),
        (24, {}, "`cluster.activation_checkpointing: on` and `cluster.micro_batch_blocks: 2`"),
        (20, {}, "`cluster.gpus_per_expert: 2` and `cluster.micro_batch_blocks: 4`"),
        (24, {"workers": 2}, "`cluster.sharding: auto`"),
        (16, {"workers": 2}, "`cluster.gpus_per_expert: 4`"),
        (16, {"workers": 2, "sharding": "auto", "activation_checkpointing": "auto"}, "`cluster.micro_batch"),
    ],
)
def test_the_nearest_setting_that_fits_is_named_and_fits(
    gigabytes: float, how: dict[str, Any], setting: str
) -> None:
    assert remedy(expert(**how), gigabytes).startswith(f"take {setting}"), remedy(expert(**how), gigabytes)


@pytest.mark.parametrize(
    ("gigabytes", "how", "blocks", "settled"),
    [
        (None, {}, 8, (False, False)),  # whose logits kernels count with 32 bits
        (141, {}, 8, (False, False)),
        (50, {}, 4, (False, False)),
        (20, {"activation_checkpointing": "auto"}, 1, (False, True)),
        (36, {"workers": 2, "sharding": "auto"}, 4, (True, False)),
        (1, {}, 1, (False, False)),
    ],
)
def test_a_pass_takes_as_many_blocks_as_fit_where_that_is_left_open(
    gigabytes: float | None, how: dict[str, Any], blocks: int, settled: tuple[bool, bool]
) -> None:
    there = None if gigabytes is None else gigabytes * GB
    open_left = expert(micro_batch_blocks="auto", **how)
    found = open_left.settled(there)
    assert (found.blocks, (found.is_sharded, found.recomputes)) == (blocks, settled)
    assert found.passes * found.blocks * open_left.how.workers == 16
    assert f"with {blocks} blocks in a forward pass" in told(open_left, there)
    given = replace(open_left, how=replace(open_left.how, micro_batch_blocks=blocks))
    assert given.settled(there) == found


@pytest.mark.parametrize(("of_update", "gigabytes", "blocks"), [(61, 141, 8), (48, 141, 8), (42, 141, 7)])
def test_passes_are_alike_where_they_can_be(of_update: int, gigabytes: float, blocks: int) -> None:
    training = replace(expert(micro_batch_blocks="auto"), blocks_per_update=of_update)
    assert training.settled(gigabytes * GB).blocks == blocks


def test_an_adapter_is_named_beside_it_where_that_fits() -> None:
    adapted = size_for(LLAMA_1B, trains_of(LORA, LLAMA_1B))
    assert ", or `branching.train: lora`" in remedy(replace(expert(), with_lora=adapted), 44)
    assert "lora" not in remedy(expert(), 44)


def test_muon_keeps_one_moment_of_the_matrices_of_layers_and_adamw_two_of_all_else() -> None:
    vectors = 2 * 2048
    layers = 16 * (2 * 2048 * (2048 + 512) + 3 * 2048 * 8192)
    size = size_for(LLAMA_1B, with_muon=True)
    assert size.parameters == 128_256 * 2048 + layers + 16 * vectors + 2048
    assert (size.by_muon, size_for(LLAMA_1B).by_muon) == (layers, 0)
    saved = expert().memory(None).peak - replace(expert(), size=size).memory(None).peak
    assert saved == 4 * layers == trained_bytes(size.parameters) - trained_bytes(size.parameters, layers)
    assert size_for(LLAMA_1B, trains_of(LORA, LLAMA_1B), with_muon=True).by_muon == 0
    feed_forward = Trains("feed-forward")
    assert size_for(LLAMA_1B, feed_forward, with_muon=True).by_muon == 16 * 3 * 2048 * 8192


def test_the_optimiser_is_in_a_models_name_where_it_is_not_adamw() -> None:
    by_adamw = training("law")
    by_muon = replace(by_adamw, training=by_adamw.training.model_copy(update={"optimizer": "muon"}))
    assert "optimizer" not in by_adamw.recipe["training"]
    assert by_muon.recipe["training"]["optimizer"] == "muon"
    lora = Trains("lora", Lora(2, 4.0, ("q_proj",)))
    assert replace(by_muon, trains=lora).ref == replace(by_adamw, trains=lora).ref, "AdamW trains adapters"


def test_what_no_setting_makes_fit_says_so() -> None:
    assert "take a smaller `model`" in remedy(expert(QWEN_7B), 8)


def test_experts_that_share_a_gpu_must_fit_it_together() -> None:
    peak = expert().memory(None).peak / GB
    three = replace(expert(gpus_per_worker=0.33), at_once=3)
    assert problem_of("an expert", three, 3.1 * peak * GB) is None
    assert remedy(replace(three, how=replace(three.how, micro_batch_blocks=1)), 60).startswith(
        "take `cluster.gpus_per_expert: 0.5`"
    )


def test_where_no_gpu_was_looked_at_nothing_is_refused_and_what_went_on_before_is_not() -> None:
    training = expert(QWEN_7B)
    demand = Demand("an expert", training.how, memory=training)
    assert memory_problem(demand, None) is None
    assert memory_problem(demand, 130 * GB) is not None
    assert memory_problem(replace(demand, saved_at=7), 130 * GB) is None
    assert memory_problem(replace(demand, saved_at=7), 100 * GB) is not None, "its state alone is more"


def test_logits_of_a_block_that_are_too_many_are_counted_by_the_piece() -> None:
    long = replace(expert(QWEN_7B, micro_batch_blocks=1), block_tokens=8192)
    short = replace(expert(QWEN_7B, micro_batch_blocks=2), block_tokens=4096)
    assert long.settings.tokens == short.settings.tokens
    head = 152_064 * 3584
    assert long.memory(None).logits == 2**28 * 10 + 4 * head
    shallow = replace(short, size=replace(short.size, layers=24))
    assert shallow.memory(None).logits == 8192 * 152_064 * 2 + 2 * head
    assert short.memory(None).logits == 2 * 8192 * 152_064 * 2, "the loss of 28 layers is compiled by itself"
