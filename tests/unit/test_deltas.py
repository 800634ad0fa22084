"""Training a part of a model: what is frozen, what is stored, and who else can open it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.equations.budget import training_flops_per_token
from btm_cluster.errors import IncompatibleError, PlanError, Stopped
from btm_cluster.language_model import loss
from btm_cluster.language_model.adapter_files import write_adapter_config
from btm_cluster.language_model.compute import Compute, autocast
from btm_cluster.language_model.delta_weights import ChangedWeights, LoraWeights
from btm_cluster.language_model.deltas import FILES, count_trained, freeze, hold_frozen_in, trains_of
from btm_cluster.language_model.development import DevelopmentLoss
from btm_cluster.language_model.lora import _config_for, adapter_config, put_adapter, with_other_adapter
from btm_cluster.language_model.model import build_model, load_model, save_weights, weights_of
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.language_model.streamed_weights import in_pieces
from btm_cluster.language_model.tensor_files import OPTIMIZER_FILE, WEIGHTS, names_in_order
from btm_cluster.language_model.training import train
from btm_cluster.language_model.training_spec import TextBlocks, TrainingSpec
from btm_cluster.language_model.training_state import (
    TrainingState,
    build_state,
    load_base_optimizer,
    load_moments,
    load_state,
    write_state,
)
from btm_cluster.language_model.update import Updates
from btm_cluster.language_model.utilisation import utilisation
from btm_cluster.plan import ALL, BranchingPlan, Lora, TrainingPlan, Trains
from btm_cluster.requests import Resources
from tests.unit.test_train_loop import Recorded

CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, CPU)
_TOKENS = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}
_LLAMA = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
_LLAMA |= {"num_key_value_heads": 1, "max_position_embeddings": 8}
_GPT2 = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "tie_word_embeddings": True}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    kind: {"model_type": kind, **shape, **_TOKENS}
    for kind, shape in {"gpt2": _GPT2, "llama": _LLAMA, "qwen2": _LLAMA}.items()
}
LORA = BranchingPlan.model_validate({"train": "lora", "lora": {"rank": 3}})
FEED_FORWARD = BranchingPlan.model_validate({"train": "feed-forward"})


class Started:
    """A base with weights, and the specification of a training that changes a part of it."""

    def __init__(self, kind: str, branching: BranchingPlan, folder: Path) -> None:
        self.model, self.folder = MODELS[kind], folder
        self.trains = trains_of(branching, self.model)
        tokens = np.random.default_rng(0).integers(64, size=(5, 8), dtype=np.uint16)
        np.save(folder / "text.npy", tokens)
        self.base = build_model(self.model, 7)
        save_weights(weights_of(self.base), folder / WEIGHTS)
        self.stored_base = TensorFiles([folder / WEIGHTS])
        self.spec = TrainingSpec(
            label="tiny",
            model=self.model,
            texts=(TextBlocks("text", Blocks([folder / "text.npy"])),),
            first_token=0,
            training=TrainingPlan(block_tokens=8, updates=6, blocks_per_domain_update=2, learning_rate=1e-2),
            first_update=2,
            last_update=6,
            milestones=(),
            from_scratch=False,
            rewarms=True,
            restart_data=True,
            is_demix=False,
            compute=Compute(CPU, 1, 2, "float32", compile=False),
            divergence_remedy="",
            trains=self.trains,
        )

    def trained(self) -> TrainingState:
        state = self.fresh()
        train(self.spec, state, Recorded(state))
        return state

    def fresh(self) -> TrainingState:
        return build_state(self.spec, ALONE, self.stored_base)

    def dense(self, state: TrainingState) -> LoraWeights | ChangedWeights:
        """The stored part of a training, over its base."""
        (file,) = write_state(state, self.folder, with_optimizer=False).values()
        if self.trains.lora is None:
            return ChangedWeights(self.stored_base, TensorFiles([file]))
        is_conv1d = self.model["model_type"] == "gpt2"
        return LoraWeights(self.stored_base, TensorFiles([file]), self.trains.lora.scale, is_conv1d)


@pytest.fixture(params=[(kind, part) for kind in MODELS for part in ("lora", "feed-forward")], ids="-".join)
def started(request: pytest.FixtureRequest, tmp_path: Path) -> Started:
    kind, part = request.param
    return Started(kind, LORA if part == "lora" else FEED_FORWARD, tmp_path)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(8)[None], use_cache=False).logits
    return found


def test_without_a_base_the_same_part_of_a_drawn_model_is_trained(started: Started) -> None:
    """What is compiled before there is a base is what the training computes."""
    bf16 = replace(started.spec, compute=replace(started.spec.compute, precision="bfloat16"))
    for spec in (started.spec, bf16):
        states = [build_state(spec, ALONE, base) for base in (started.stored_base, None)]
        over_base, drawn = (
            {name: (p.requires_grad, p.dtype, p.shape) for name, p in state.model.named_parameters()}
            for state in states
        )
        assert drawn == over_base
        assert {name for name, _ in states[1].weights()} == {name for name, _ in states[0].weights()}


def test_only_the_part_changes_and_what_is_stored_of_it_is_the_whole_model_over_its_base(
    started: Started,
) -> None:
    assert torch.equal(
        logits(started.fresh().model), logits(started.base)
    )  # B is zero, feed-forwards the base's
    state = started.trained()
    assert state.has_finite_weights()
    base, names = weights_of(started.base), set(dict(state.weights()))
    now = {name.replace(".base_layer.", "."): p for name, p in state.model.named_parameters()}
    changed = {name for name in base if not torch.equal(now[name], base[name])}
    of_adapter = {name for name in now if ".lora_" in name}
    if started.trains.lora is None:
        assert changed == names
        assert names == {name for name in base if ".mlp." in name}
    else:
        assert not changed
        assert len(names) == len(of_adapter)
    moments = set(dict(state.moments()))
    assert moments == {"step", *(f"{moment}.{n}" for moment in ("exp_avg", "exp_avg_sq") for n in names)}
    assert sum(t.numel() for _, t in state.weights()) == count_trained(started.model, started.trains)[0]

    whole = started.dense(state)
    assert names_in_order(whole.header) == names_in_order(started.stored_base.header)
    assert torch.allclose(logits(load_model(started.model, whole)), logits(state.model), atol=1e-6)
    assert not torch.allclose(logits(state.model), logits(started.base), atol=1e-3)


def test_a_training_that_was_cut_ends_in_the_same_bits(started: Started) -> None:
    expected = dict(started.trained().weights())
    cut = started.fresh()
    with pytest.raises(Stopped):
        train(started.spec, cut, Recorded(cut, stops_at=4))
    write_state(cut, started.folder, with_optimizer=True)
    resumed = started.fresh()
    files = [started.folder / name for name in (FILES[started.trains.part], OPTIMIZER_FILE)]
    load_state(resumed, 4, TensorFiles(files[:1]), TensorFiles(files[1:]), "a test's state")
    train(started.spec, resumed, Recorded(resumed))
    found = dict(resumed.weights())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_feed_forwards_keep_the_moments_that_their_base_has_of_them(tmp_path: Path) -> None:
    started = Started("llama", FEED_FORWARD, tmp_path)
    of_all = replace(started.spec, trains=ALL, from_scratch=True)
    whole = build_state(of_all, ALONE)
    train(of_all, whole, Recorded(whole))
    kept = dict(whole.moments())
    save_weights(kept, tmp_path / OPTIMIZER_FILE)
    state = started.fresh()
    load_moments(state, TensorFiles([tmp_path / OPTIMIZER_FILE]), "the base")
    found = dict(state.moments())
    assert found.keys() == {"step", *(name for name in kept if ".mlp." in name)}
    assert all(torch.equal(found[name], kept[name]) for name in found)


def test_feed_forwards_go_on_from_the_float32_weights_of_a_base_that_is_stored_in_16_bits(
    tmp_path: Path,
) -> None:
    started = Started("llama", FEED_FORWARD, tmp_path)
    of_all = replace(started.spec, trains=ALL, from_scratch=True)
    whole = build_state(of_all, ALONE)
    train(of_all, whole, Recorded(whole))
    files = write_state(whole, tmp_path, with_optimizer=True, dtype=torch.bfloat16)
    exact, rounded = weights_of(whole.model), TensorFiles([files[WEIGHTS]])
    state = build_state(started.spec, ALONE, rounded)
    load_base_optimizer(state, TensorFiles([files[OPTIMIZER_FILE]]), "the base")
    for name, tensor in weights_of(state.model).items():
        expected = exact[name] if ".mlp." in name else rounded.read(name).float()
        assert torch.equal(tensor, expected), name


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
@pytest.mark.parametrize("kind", MODELS)
def test_peft_opens_an_adapter_over_its_base_and_predicts_as_training_does(kind: str, tmp_path: Path) -> None:
    started = Started(kind, LORA, tmp_path)
    state = started.trained()
    started.base.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_state(state, adapter, with_optimizer=False)
    assert started.trains.lora is not None
    write_adapter_config(adapter_config(started.trains.lora, started.model), adapter)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, adapter)
    assert torch.allclose(logits(opened), logits(state.model), atol=1e-6)
    merged = opened.merge_and_unload().state_dict()
    dense = started.dense(state)
    for name in names_in_order(dense.header):
        assert torch.allclose(dense.read(name), merged[name], atol=1e-6), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("branching", [LORA, FEED_FORWARD], ids=["lora", "feed-forward"])
def test_frozen_weights_in_16_bits_predict_bit_by_bit_as_in_32(
    kind: str, branching: BranchingPlan, tmp_path: Path
) -> None:
    state = Started(kind, branching, tmp_path).trained()

    def predicted() -> torch.Tensor:
        with autocast(CPU, "bfloat16"):
            return logits(state.model)

    before, size = predicted(), sum(p.nbytes for p in state.model.parameters())
    hold_frozen_in(state.model, "bfloat16")
    assert torch.equal(predicted(), before)
    assert sum(p.nbytes for p in state.model.parameters()) < size
    assert all(p.dtype == torch.float32 for p in state.model.parameters() if p.requires_grad)


def test_a_base_is_loaded_in_16_bits_as_if_it_had_been_held_in_them_afterwards(started: Started) -> None:
    """And A is drawn in float32, as PEFT itself does beside layers in float32."""
    compute = replace(started.spec.compute, precision="bfloat16")
    found = build_state(replace(started.spec, compute=compute), ALONE, started.stored_base).model
    expected = load_model(started.model, started.stored_base)
    if started.trains.lora is None:
        freeze(expected, started.trains, 0)
    else:
        torch.manual_seed(started.spec.training.random_seed)
        inject_adapter_in_model(_config_for(started.trains.lora, expected), expected)
    hold_frozen_in(expected, "bfloat16")
    parameters = dict(found.named_parameters())
    assert list(parameters) == [name for name, _ in expected.named_parameters()]
    for name, parameter in expected.named_parameters():
        assert parameters[name].dtype == parameter.dtype, name
        assert parameters[name].requires_grad == parameter.requires_grad, name
        assert torch.equal(parameters[name], parameter), name


def test_a_training_of_an_adapter_is_compiled_in_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(module: Any, dynamic: bool, options: Any) -> None:  # noqa: ARG001
        compiled = torch.compile(module._call_impl, backend="eager", dynamic=dynamic, fullgraph=True)
        module._compiled_call_impl = compiled

    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    started = Started("llama", LORA, tmp_path)
    plain = dict(started.trained().weights())
    started.spec = replace(started.spec, compute=replace(started.spec.compute, compile=True))
    compiled = dict(started.trained().weights())
    for name, tensor in plain.items():
        assert torch.allclose(compiled[name], tensor, atol=1e-4), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by which Dynamo looks at an input
def test_a_deep_models_adapter_is_compiled_layer_by_layer_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, 16 layers took 29 s to trace; an adapter is what makes each layer's graph long."""
    graphs: list[int] = []
    compiles = torch.compile

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def by_eager(function: Any, dynamic: bool, options: Any = None) -> Any:  # noqa: ARG001
        return compiles(function, backend=count, dynamic=dynamic, fullgraph=True)

    monkeypatch.setitem(MODELS, "llama", {**MODELS["llama"], "num_hidden_layers": 13})
    started = Started("llama", LORA, tmp_path)
    started.spec = replace(started.spec, last_update=3)
    plain = dict(started.trained().weights())
    monkeypatch.setattr(torch, "compile", by_eager)
    started.spec = replace(started.spec, compute=replace(started.spec.compute, compile=True))
    compiled = dict(started.trained().weights())
    assert len(graphs) == 3, "the first layer, whose input has no gradient; all others; and the loss"
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_flops_of_frozen_weights_have_no_part_for_gradients_of_their_own(tmp_path: Path) -> None:
    started = Started("llama", LORA, tmp_path)
    model = started.fresh().model
    adapter, frozen = count_trained(started.model, started.trains)
    how = Resources(1, 1.0, 1, 1, "bfloat16", False)
    expected = 6 * adapter + 4 * frozen + training_flops_per_token(0, 2, 16, 8)
    assert utilisation(model, how, 8, 1e9, "NVIDIA H200") == pytest.approx(1e9 * expected / 989e12)


def test_averages_are_of_the_change_and_never_of_its_factors(tmp_path: Path) -> None:
    started = Started("llama", LORA, tmp_path)
    one = started.trained()
    started.spec = replace(
        started.spec,
        training=started.spec.training.model_copy(update={"random_seed": 5, "learning_rate": 0.1}),
    )
    other = started.trained()
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = (started.dense(state).read(name).clone() for state in (one, other))
    mean = (first + second) / 2
    factors = [dict(state.weights()) for state in (one, other)]
    a, b = (
        sum(of[f"base_model.model.model.layers.0.mlp.up_proj.lora_{x}.weight"] for of in factors) / 2
        for x in "AB"
    )
    assert started.trains.lora is not None
    of_factors = started.stored_base.read(name) + started.trains.lora.scale * b @ a
    assert (mean - of_factors).abs().max() > 0.1 * (mean - started.stored_base.read(name)).abs().max()


def test_pieces_of_an_adapted_model_are_those_of_its_tensors(started: Started) -> None:
    weights = started.dense(started.trained())
    in_order = in_pieces(weights)
    for name in names_in_order(weights.header):
        whole = weights.read(name).reshape(-1)
        for first, count in [(0, len(whole)), (3, 7), (len(whole) - 5, 5), (1, len(whole) - 2)]:
            piece = torch.cat([*in_order.pieces(name, first, count)])
            torch.testing.assert_close(piece, whole[first : first + count], rtol=1e-6, atol=1e-7)


def test_an_adapter_of_another_base_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    started = Started("llama", LORA, tmp_path)
    (adapter,) = write_state(started.fresh(), tmp_path, with_optimizer=False).values()
    wider = build_model(MODELS["llama"] | {"hidden_size": 32}, 0)
    save_weights(weights_of(wider), tmp_path / "wider.safetensors")
    with pytest.raises(IncompatibleError, match="does not fit the model that it changes") as refused:
        LoraWeights(TensorFiles([tmp_path / "wider.safetensors"]), TensorFiles([adapter]), 2.0)
    assert "base that it was trained on" in str(refused.value.remedy)
    changed = tmp_path / "changed.safetensors"
    save_file({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, changed)
    with pytest.raises(IncompatibleError, match="a tensor of"):
        ChangedWeights(started.stored_base, TensorFiles([changed]))


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_another_adapter_shares_all_the_rest(kind: str, tmp_path: Path) -> None:
    started = Started(kind, LORA, tmp_path)
    assert started.trains.lora is not None
    files = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        started.spec = replace(
            started.spec, training=started.spec.training.model_copy(update={"random_seed": number})
        )
        files += write_state(started.trained(), folder, with_optimizer=False).values()
    adapted, expected = (load_model(started.model, started.stored_base) for _ in range(2))
    put_adapter(adapted, started.trains.lora, TensorFiles(files[:1]))
    put_adapter(expected, started.trains.lora, TensorFiles(files[1:]))
    other = with_other_adapter(adapted, TensorFiles(files[1:]))
    assert torch.equal(logits(other), logits(expected))
    assert not torch.equal(logits(other), logits(adapted))
    own = dict(adapted.named_parameters())
    shared = {name for name, parameter in other.named_parameters() if parameter is own[name]}
    assert shared == {name for name in own if "lora_" not in name}
    *kept, (lacking, _) = load_file(files[1]).items()
    save_file(dict(kept), tmp_path / "damaged.safetensors")
    with pytest.raises(KeyError, match=re.escape(lacking)):
        with_other_adapter(adapted, TensorFiles([tmp_path / "damaged.safetensors"]))


def test_a_state_of_other_names_is_refused(tmp_path: Path) -> None:
    started = Started("llama", LORA, tmp_path)
    (file,) = write_state(started.fresh(), tmp_path, with_optimizer=False).values()
    tensors = load_file(file)
    first, *_ = tensors
    save_file({**{name: t for name, t in tensors.items() if name != first}, "other": torch.zeros(1)}, file)
    with pytest.raises(IncompatibleError, match=f"missing: {first}; unexpected: other"):
        load_state(started.fresh(), 2, TensorFiles([file]), None, "a test's state")


def test_what_a_plan_trains_is_named_by_layers_whichever_way_it_is_written() -> None:
    every = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert trains_of(LORA, MODELS["llama"]) == Trains("lora", Lora(3, 32.0, every))
    some = {"rank": 8, "modules": ["v_proj", "q_proj", "v_proj"]}
    found = trains_of(BranchingPlan.model_validate({"train": "lora", "lora": some}), MODELS["llama"])
    assert found.lora == Lora(8, 32.0, ("q_proj", "v_proj"))
    one = BranchingPlan.model_validate({"train": "lora", "lora": {"modules": "self_attn.q_proj", "alpha": 4}})
    assert trains_of(one, MODELS["llama"]).lora == Lora(16, 4.0, ("self_attn.q_proj",))
    assert trains_of(LORA, MODELS["gpt2"]).lora == Lora(3, 32.0, ("c_attn", "c_fc", "c_proj"))


@pytest.mark.parametrize(
    ("branching", "kind", "found"),
    [
        ({"train": "lora", "lora": {"modules": ["q_prj"]}}, "llama", "did you mean `q_proj`"),
        ({"train": "lora", "lora": {"modules": ["lm_head"]}}, "llama", "names no linear layer"),
        ({"train": "lora", "lora": {"modules": ["input_layernorm"]}}, "llama", "names no linear layer"),
        (
            {"train": "lora", "lora": {"rank": 9}},
            "llama",
            "rank 9, and model.layers.0.self_attn.k_proj of 8 × 16",
        ),
        ({"train": "lora", "lora": {"rank": 17}}, "gpt2", "at most 16"),
        ({"train": "lora", "lora": {"rank": 1}}, "mamba", "'out_proj' is incompatible with Mamba"),
        ({"train": "feed-forward"}, "opt", "the feed-forwards of a opt cannot be found"),
    ],
)
def test_what_a_model_cannot_be_trained_by_is_refused(
    branching: dict[str, Any], kind: str, found: str
) -> None:
    opt = {"model_type": "opt", "num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 16, "vocab_size": 64}
    opt |= {"num_attention_heads": 2, "word_embed_proj_dim": 16}
    mamba = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 16, "state_size": 4}
    model = (MODELS | {"opt": opt, "mamba": mamba | _TOKENS})[kind]
    with pytest.raises(PlanError) as refused:
        trains_of(BranchingPlan.model_validate(branching), model)
    assert found in str(refused.value)


def test_an_adapters_configuration_is_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    lora = trains_of(LORA, MODELS["gpt2"]).lora
    assert lora is not None
    written = write_adapter_config(adapter_config(lora, MODELS["gpt2"]), tmp_path).read_text()
    fields = json.loads(written)
    assert fields["target_modules"] == sorted(fields["target_modules"])
    assert (fields["r"], fields["lora_alpha"], fields["fan_in_fan_out"]) == (3, 32, True)
    assert "peft_version" not in fields


def test_a_micro_batch_of_an_adapter_has_gradients_in_float32(tmp_path: Path) -> None:
    started = Started("llama", LORA, tmp_path)
    state = started.fresh()
    Updates(started.spec, state, ALONE)._backward(torch.zeros(2, 8, dtype=torch.int64), predicted=16)
    gradients = {name for name, p in state.model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, p in state.model.named_parameters() if ".lora_" in name}


def test_a_large_vocabularys_head_is_applied_in_pieces_over_frozen_weights_in_16_bits(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks_DNT = np.random.default_rng(1).integers(64, size=(1, 4, 8))
    compute = replace(started.spec.compute, precision="bfloat16")
    started.spec = replace(started.spec, compute=compute, development_DNT=torch.from_numpy(blocks_DNT))
    whole = _first_losses(started)
    monkeypatch.setattr(loss, "LARGEST_BLOCK_LOGITS", {"cpu": 1})
    assert Updates(started.spec, started.fresh(), ALONE).head is not None
    assert _first_losses(started) == pytest.approx(whole, rel=1e-2)


def _first_losses(started: Started) -> list[float]:
    """On development blocks, and of the first update."""
    state = started.fresh()
    development = DevelopmentLoss(started.spec, state, ALONE)
    return [development.take().item(), Updates(started.spec, state, ALONE).make().shown.read()[0].item()]
