"""LoRA experts of one base that read on in one pass, against each of them read by itself."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm_cluster.equations.posterior import Posterior
from btm_cluster.language_model import adapter_stacks
from btm_cluster.language_model.adapter_stacks import stacked
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings, bytes_of
from btm_cluster.language_model.lora import _config_for
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.row_cache import RowCacheDecoder
from btm_cluster.language_model.row_check import usable_stacks
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.plan import Lora
from tests.integration.test_same_as_transformers import ARCHITECTURES, NOT_BY_ROWS
from tests.unit.test_engine import AsksTheHost

VOCABULARY, BLOCK = 48, 16
BY_ROWS = [kind for kind in ARCHITECTURES if kind not in NOT_BY_ROWS]
MODULES = {
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_h_to_4h"),
    "opt": ("q_proj", "fc1"),
}
MODULES |= {"phi3": ("qkv_proj", "down_proj"), "deepseek_v3": ("q_b_proj", "o_proj")}
MODULES |= {"mixtral": ("q_proj", "o_proj"), "apertus": ("q_proj", "up_proj")}
USUAL = ("q_proj", "v_proj", "down_proj")


def base_of(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = ARCHITECTURES[kind] | {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **fields, pad_token_id=None, initializer_range=0.3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)


def adapted(
    base: PreTrainedModel, modules: tuple[str, ...], seed: int, rank: int = 3, alpha: float = 4.0
) -> PreTrainedModel:
    """A model over the very same base, as experts in one memory are."""
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    inject_adapter_in_model(_config_for(Lora(rank, alpha, modules), model), model, "default")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(base.device)
    return model.eval().requires_grad_(False)


def opened(models: Sequence[PreTrainedModel], rows: int = 3, **more: Any) -> EnsembleEngine:
    prior = torch.full((len(models),), 1 / len(models), dtype=torch.float64).log()
    settings = EngineSettings(first_token=0, vocabulary=VOCABULARY, block_tokens=BLOCK, rows=rows, **more)
    return EnsembleEngine(models, Mixing(prior, Posterior("full")), settings)


def sizes(models: Sequence[PreTrainedModel]) -> list[tuple[int, ...]]:
    return [stack.experts for stack in stacked(models)]


def logp_of(model: Any, text: Sequence[int]) -> torch.Tensor:
    """log p of a text's tokens, read at once after the first token."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([[0, *text]])).logits[0].double()
    return torch.log_softmax(logits_TV, dim=-1)[range(len(text)), list(text)]


@pytest.mark.parametrize("kind", BY_ROWS)
def test_stacked_experts_mix_as_each_read_by_itself(kind: str) -> None:
    """Beside the base itself, in rows that begin at different places and come and go."""
    base, modules = base_of(kind), MODULES.get(kind, USUAL)
    experts = [adapted(base, modules, 1), base, adapted(base, modules, 2), adapted(base, modules, 3)]
    text = torch.randint(1, VOCABULARY, (BLOCK,), generator=torch.Generator().manual_seed(9)).tolist()
    logp_ET = torch.stack([logp_of(model, text) for model in experts])
    assert (logp_ET[0] - logp_ET[1:]).abs().amax(dim=1).min() > 0.1, "the experts differ"
    joint_T = torch.logsumexp(logp_ET.cumsum(dim=1), dim=0) - torch.tensor(4.0).log()
    expected_T = joint_T - torch.cat([torch.zeros(1), joint_T[:-1]])

    engine = opened(experts)
    assert [stack.experts for stack in decoder_of(engine)._stacks] == [(0, 2, 3), (1,)]
    gone, *_ = engine.admit([Prompt(text[3:9], BLOCK)])
    engine.step()
    early, late = engine.admit([Prompt(text[:2], BLOCK), Prompt(text[:7], BLOCK)])
    engine.release(gone)
    found: dict[int, list[float]] = {early: [], late: []}
    starts = {early: 2, late: 7}
    while forced := {
        row: text[starts[row] + len(found[row])] for row in found if starts[row] + len(found[row]) < BLOCK
    }:
        for row, drawn in engine.step(forced).items():
            found[row].append(drawn.logp)
    for row, start in starts.items():
        assert found[row] == pytest.approx(expected_T[start:].tolist(), abs=2e-4)


def test_a_step_of_a_stack_asks_the_host_nothing_so_that_it_can_be_captured() -> None:
    base = base_of("llama")
    engine = opened([adapted(base, USUAL, seed) for seed in range(3)])
    engine.admit([Prompt([5, 6], 9), Prompt([], 9)])
    with torch.inference_mode(), AsksTheHost():
        decoder_of(engine)._read_on(0, 2, BLOCK)
        decoder_of(engine)._read_on(0, 2, BLOCK, alone=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_of_a_stack_write_what_steps_that_are_not_captured_write(precision: str) -> None:
    base = base_of("llama").to("cuda")
    models = [adapted(base, USUAL, seed) for seed in range(3)]
    prompts = [Prompt([5, 6, 7][: n + 1], 9, Sampling(random_seed=n)) for n in range(3)]
    written = []
    for captures in (False, True):
        engine = opened(models, device="cuda", captures=captures, precision=precision, way="rows")
        assert len(decoder_of(engine)._stacks) == 1
        for _ in range(3):  # as it is, captured, and replayed
            written.append([one.tokens for one in engine.generate(prompts)])
        assert engine.captures == captures
    assert all(one == written[0] for one in written)


def decoder_of(engine: EnsembleEngine) -> RowCacheDecoder:
    decoder = engine._decoder
    assert isinstance(decoder, RowCacheDecoder)
    return decoder


@pytest.mark.parametrize("count", [4, 9])
@pytest.mark.parametrize("asked", [(2,), (0, 3)])
def test_few_experts_of_a_stack_write_what_they_would_without_the_others(
    count: int, asked: tuple[int, ...]
) -> None:
    """In a stack of four two read on together with all, and of nine each alone: beside a row of all experts, and
    after it."""
    base = base_of("llama")
    experts = [adapted(base, USUAL, seed) for seed in range(count)]
    own = opened([adapted(base, USUAL, seed) for seed in asked])
    prompts = [Prompt([4, 5], 10, Sampling(random_seed=seed)) for seed in range(2)]
    expected = [one.tokens for one in own.generate(prompts)]
    engine = opened(experts)
    of_some = [replace(prompt, experts=asked) for prompt in prompts]
    for beside in ([Prompt([6], 4)], []):
        written = engine.generate([*beside, *of_some])[len(beside) :]
        assert [one.tokens for one in written] == expected


def test_only_adapters_that_are_alike_over_the_very_same_base_are_stacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, other = base_of("llama"), base_of("llama", seed=1)
    some = [adapted(base, USUAL, seed) for seed in range(3)]
    assert sizes([*some, base]) == [(0, 1, 2), (3,)]
    assert sizes([some[0], adapted(other, USUAL, 1), some[1]]) == [(0, 2), (1,)]
    assert sizes([some[0], adapted(base, USUAL, 1, rank=2)]) == [(0,), (1,)]
    assert sizes([some[0], adapted(base, USUAL, 1, alpha=8.0)]) == [(0,), (1,)]
    assert sizes([some[0], adapted(base, USUAL[:2], 1)]) == [(0,), (1,)]
    assert sizes([base, other]) == [(0,), (1,)]
    fused = base_of("deepseek_v3")  # its experts' matrices are no linear layers
    assert sizes([adapted(fused, ("down_proj",), seed) for seed in range(2)]) == [(0,), (1,)]
    monkeypatch.setattr(adapter_stacks, "MOST_STACKED", 2)
    assert sizes(some) == [(0, 1), (2,)]


def test_a_stack_takes_no_memory_beside_its_experts() -> None:
    base = base_of("llama")
    models = [adapted(base, USUAL, seed) for seed in range(3)]
    before = bytes_of(models), [logp_of(model, [5, 6, 7]) for model in models]
    (stack,) = stacked(models)
    held = {
        tensor.untyped_storage().data_ptr() for tensor in (*stack.model.parameters(), *stack.model.buffers())
    }
    for model in models:
        assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} <= held
    assert bytes_of(models) == before[0]
    for model, logp in zip(models, before[1], strict=True):
        assert torch.equal(logp_of(model, [5, 6, 7]), logp)


def test_experts_that_would_predict_otherwise_in_a_stack_read_on_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, rough = base_of("llama"), base_of("llama").to(torch.bfloat16)
    models = [adapted(base, USUAL, seed) for seed in range(3)]
    in_16_bits = [adapted(rough, USUAL, seed).to(torch.bfloat16) for seed in range(3)]
    assert len(usable_stacks(models, BLOCK)) == len(usable_stacks(in_16_bits, BLOCK)) == 1
    monkeypatch.setattr(adapter_stacks._StackedLayer, "forward", lambda layer, taken: layer.base_layer(taken))
    assert [stack.experts for stack in usable_stacks(models, BLOCK)] == [(0,), (1,), (2,)]
    assert [stack.experts for stack in usable_stacks(in_16_bits, BLOCK)] == [(0,), (1,), (2,)]


def test_each_stack_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    models = [
        *(adapted(base, USUAL, seed) for seed in range(3)),
        *(adapted(base, USUAL, seed, rank=2) for seed in (3, 4)),
    ]
    forward = adapter_stacks._StackedLayer.forward

    def wrong_of_two(layer: Any, taken: torch.Tensor) -> torch.Tensor:
        return layer.base_layer(taken) if len(layer.a_ErD) == 2 else forward(layer, taken)

    monkeypatch.setattr(adapter_stacks._StackedLayer, "forward", wrong_of_two)
    assert [stack.experts for stack in usable_stacks(models, BLOCK)] == [(0, 1, 2), (3,), (4,)]


def test_an_expert_whose_predictions_are_not_finite_keeps_no_other_from_writing() -> None:
    base = base_of("llama")
    models = [adapted(base, USUAL, seed) for seed in range(3)]
    _adapter_of(models[1])[0].fill_(torch.nan)
    engine = opened(models)
    assert engine.generate([Prompt([4], 5, experts=(0,))])[0].tokens


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_in_16_bits_too_a_stack_without_its_adapters_is_noticed(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("llama").to(torch.bfloat16)
    models = [adapted(base, USUAL, seed).to(torch.bfloat16) for seed in range(3)]
    for model in models:
        for parameter in _adapter_of(model):
            parameter.mul_(share)
    assert len(usable_stacks(models, BLOCK)) == 1
    monkeypatch.setattr(adapter_stacks._StackedLayer, "forward", lambda layer, taken: layer.base_layer(taken))
    assert len(usable_stacks(models, BLOCK)) == 3


def test_a_newer_engine_leaves_what_the_graphs_of_the_one_before_read_in_its_place() -> None:
    """And an expert that is left of a stack holds no more than its own adapter."""
    base = base_of("llama")
    models = [adapted(base, USUAL, seed) for seed in range(3)]
    one = opened(models[:1])
    held = [(parameter.data_ptr(), parameter.clone()) for parameter in models[0].parameters()]
    opened(models)
    kept = {tensor.data_ptr(): tensor for tensor in decoder_of(one)._stacks[0]._held}
    assert all(torch.equal(kept[address], values) for address, values in held)
    opened(models[2:])
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in _adapter_of(models[2]))


def _adapter_of(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.data for name, parameter in model.named_parameters() if "lora_" in name]


def test_experts_in_16_bits_are_stacked_though_rounding_moves_their_predictions() -> None:
    base = base_of("llama")
    base.lm_head.weight.data.mul_(20)  # as sure of tokens as a trained model
    base.to(torch.bfloat16)
    models = [adapted(base, USUAL, seed).to(torch.bfloat16) for seed in range(3)]
    assert len(usable_stacks(models, BLOCK)) == 1
    stacks = decoder_of(opened(models, precision="bfloat16", way="rows"))._stacks
    assert [stack.experts for stack in stacks] == [(0, 1, 2)]
