"""The train loop by itself, on a state and callbacks in memory: no store, no request."""

import gzip
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.data.blocks import END, READ, TEXT, Blocks
from btm_cluster.errors import DivergedError, Stopped
from btm_cluster.language_model import training
from btm_cluster.language_model.attention import leave_causal_masks_out
from btm_cluster.language_model.batches import blocks_of_update
from btm_cluster.language_model.compute import Compute
from btm_cluster.language_model.demix import has_row_per_domain, split_feed_forwards
from btm_cluster.language_model.layers import hand_on_in_bfloat16, layers_of
from btm_cluster.language_model.loss import read_after, read_tokens
from btm_cluster.language_model.model import build_model
from btm_cluster.language_model.optimizer import build_optimizer
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.language_model.tensor_files import OPTIMIZER_FILE, WEIGHTS
from btm_cluster.language_model.tracing import Trace
from btm_cluster.language_model.training import UpdateReport, train
from btm_cluster.language_model.training_spec import TextBlocks, TrainingSpec
from btm_cluster.language_model.training_state import (
    TrainingState,
    build_state,
    load_state,
    write_state,
)
from btm_cluster.language_model.update import Updates
from btm_cluster.plan import TrainingPlan

CPU = torch.device("cpu")
ALONE = ProcessGroup(0, 1, CPU)
MODEL = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 64}
MODEL |= {
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
SMALL |= {"num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _report_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)


@pytest.fixture
def spec(tmp_path: Path) -> TrainingSpec:
    """Four updates on two texts of five blocks."""
    tokens = np.random.default_rng(0).integers(64, size=(2, 5, 8), dtype=np.uint16)
    for name, blocks in zip("ab", tokens, strict=True):
        np.save(tmp_path / f"{name}.npy", blocks)
    return TrainingSpec(
        label="tiny",
        model=MODEL,
        texts=tuple(TextBlocks(name, Blocks([tmp_path / f"{name}.npy"])) for name in "ab"),
        first_token=0,
        training=TrainingPlan(block_tokens=8, updates=4, blocks_per_domain_update=2, learning_rate=1e-2),
        first_update=0,
        last_update=4,
        milestones=(2,),
        from_scratch=True,
        rewarms=False,
        restart_data=False,
        is_demix=False,
        compute=Compute(CPU, 1, 3, "float32", compile=False),
        divergence_remedy="train more calmly",
    )


@dataclass
class Recorded:
    """Notes what the loop calls, and at which update; stops before the update
    `stops_at`, and saves as `saves_at` says."""

    state: TrainingState
    stops_at: int = -1
    saves_at: tuple[int, ...] = ()
    calls: list[Any] = field(default_factory=list)

    def should_stop(self) -> bool:
        return self.state.update == self.stops_at

    def should_save(self) -> bool:
        return self.state.update in self.saves_at

    def save(self, state: TrainingState, wait: bool) -> None:
        self.calls.append(("save and wait" if wait else "save", state.update))

    def passed_milestone(self, state: TrainingState) -> None:
        self.calls.append(("milestone", state.update))

    def report(self, state: TrainingState, report: UpdateReport) -> None:
        assert report.loss > 0
        self.calls.append(("report", state.update))


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.weights()}


def test_callbacks_are_called_at_their_moments(spec: TrainingSpec) -> None:
    state = build_state(spec, ALONE)
    callbacks = Recorded(state, saves_at=(0, 1))
    train(spec, state, callbacks)
    assert state.update == 4
    assert callbacks.calls == [
        ("report", 1), ("save", 1), ("report", 2), ("save", 2), ("milestone", 2), ("report", 3), ("report", 4),
    ]  # fmt: skip


def test_a_stop_saves_what_there_is_and_a_state_loaded_from_it_ends_in_the_same_weights(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    whole = build_state(spec, ALONE)
    train(spec, whole, Recorded(whole))
    cut = build_state(spec, ALONE)
    callbacks = Recorded(cut, stops_at=3)
    with pytest.raises(Stopped, match="tiny was stopped"):
        train(spec, cut, callbacks)
    assert callbacks.calls[-1] == ("save and wait", 3)
    write_state(cut, tmp_path, with_optimizer=True)
    resumed = build_state(spec, ALONE)
    stored, moments = (TensorFiles([tmp_path / name]) for name in (WEIGHTS, OPTIMIZER_FILE))
    load_state(resumed, 3, stored, moments, "a test's state")
    train(spec, resumed, Recorded(resumed))
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


@pytest.mark.parametrize("is_demix", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_state_that_is_loaded_draws_nothing_before(
    spec: TrainingSpec, tmp_path: Path, kind: str, is_demix: bool
) -> None:
    model = MODEL if kind == "gpt2" else {"model_type": kind, **SMALL}
    spec = replace(spec, model=model, is_demix=is_demix)
    drawn = build_state(spec, ALONE)
    files = write_state(drawn, tmp_path, with_optimizer=False)
    before = torch.manual_seed(1).get_state()
    state = build_state(spec, ALONE, draws_weights=False)
    assert torch.equal(torch.get_rng_state(), before)
    load_state(state, 2, TensorFiles(list(files.values())), None, "a test's state")
    found, expected = state.model.state_dict(), drawn.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    buffers = dict(state.model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in drawn.model.named_buffers())


def test_a_trace_of_some_updates_changes_no_bit_and_is_not_left_half_written(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    traced_spec = replace(spec, trace_file=tmp_path / "trace.json.gz")
    plain, traced, cut = (build_state(spec, ALONE) for _ in range(3))
    with pytest.raises(Stopped):
        train(traced_spec, cut, Recorded(cut, stops_at=3))
    assert not list(tmp_path.glob("trace*"))
    train(spec, plain, Recorded(plain))
    train(traced_spec, traced, Recorded(traced))
    torch.testing.assert_close(weights(traced), weights(plain), rtol=0, atol=0)
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = Counter(event.get("name") for event in json.load(file)["traceEvents"])
    assert names["Optimizer.step#AdamW.step"] == 2, "of the second half of four updates"


def test_a_spoiled_state_is_neither_saved_nor_a_milestone_and_the_error_has_the_callers_remedy(
    spec: TrainingSpec,
) -> None:
    endless = replace(spec, training=spec.training.model_copy(update={"learning_rate": 1e300}))
    state = build_state(endless, ALONE)
    callbacks = Recorded(state, saves_at=(0, 1, 2, 3))
    with pytest.raises(DivergedError, match="tiny: the loss or the weights are not finite") as failed:
        train(endless, state, callbacks)
    assert failed.value.remedy == "train more calmly"
    assert {call for call, _ in callbacks.calls} == {"report"}


def test_trying_an_update_out_leaves_the_state_as_it_was(spec: TrainingSpec) -> None:
    tried, untouched = build_state(spec, ALONE), build_state(spec, ALONE)
    blocks_of_nothing = replace(
        spec, texts=tuple(TextBlocks(text.identity, Blocks([])) for text in spec.texts)
    )
    Updates(blocks_of_nothing, tried, ALONE).try_out()
    for state in (tried, untouched):
        train(spec, state, Recorded(state))
    torch.testing.assert_close(dict(tried.weights()), dict(untouched.weights()), rtol=0, atol=0)
    torch.testing.assert_close(dict(tried.moments()), dict(untouched.moments()), rtol=0, atol=0)


def test_the_loss_is_the_mean_over_predicted_tokens_whatever_else_is_read(
    spec: TrainingSpec, tmp_path: Path
) -> None:
    """Of all micro-batches together, however many each has."""
    marks = np.random.default_rng(1).choice([READ, READ, TEXT, END], size=(2, 5, 8)).astype(np.uint8)
    marks[:, :, :5] = READ
    texts = []
    for text, own in zip(spec.texts, marks, strict=True):
        np.save(tmp_path / f"{text.identity}-marks.npy", own)
        texts.append(replace(text, marks=Blocks([tmp_path / f"{text.identity}-marks.npy"])))
    spec = replace(
        spec,
        texts=tuple(texts),
        model=MODEL | {"resid_pdrop": 0.0},
        compute=replace(spec.compute, micro_batch_blocks=1),
    )
    state, by_hand = build_state(spec, ALONE), build_state(spec, ALONE)
    made = Updates(spec, state, ALONE).make()
    blocks = blocks_of_update(spec, 0, ALONE, None)
    plain = [text.blocks.take(np.arange(5)).tolist() for text in spec.texts]
    assert all(block in plain[0] + plain[1] for block in read_tokens(blocks).tolist())
    logits = by_hand.model(input_ids=read_after(read_tokens(blocks), 0)).logits
    is_predicted = blocks >= 0
    loss = torch.nn.functional.cross_entropy(logits[is_predicted], blocks[is_predicted])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), spec.training.gradient_clip)
    assert int(made.predicted) == int(is_predicted.sum()) < blocks.numel() / 2
    torch.testing.assert_close(made.shown.read()[0], loss.detach())
    torch.testing.assert_close(made.gradient_norm, norm)


def test_development_loss_changes_no_bit_of_a_training_and_has_nothing_compiled_anew(
    spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def with_count(module: torch.nn.Module, **_: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=count, dynamic=False)

    monkeypatch.setattr(torch.nn.Module, "compile", with_count)
    spec = replace(spec, compute=replace(spec.compute, micro_batch_blocks=4, compile=True))
    development = torch.randint(64, (2, 3, 8))
    development[0, 2, 5:] = ~development[0, 2, 5:]  # read alone
    states, counts = [], []
    for looked_at in (None, development):
        torch._dynamo.reset()
        compiled.clear()
        states.append(build_state(spec, ALONE))
        train(replace(spec, development_DNT=looked_at), states[-1], Recorded(states[-1]))
        counts.append(len(compiled))
    plain, looked = states
    torch.testing.assert_close(dict(plain.weights()), dict(looked.weights()), rtol=0, atol=0)
    torch.testing.assert_close(dict(plain.moments()), dict(looked.moments()), rtol=0, atol=0)
    assert counts[0] == counts[1] > 0
    curves = [state.recording.curve() for state in states]
    assert (curves[0].development.updates, curves[1].development.updates) == ([], [2, 4])
    assert curves[0].loss == curves[1].loss
    assert looked.model.training
    with torch.no_grad():
        tokens = read_tokens(development.flatten(0, 1))
        logp = torch.log_softmax(looked.model.eval()(read_after(tokens, 0)).logits, -1)
    known = development.flatten(0, 1) >= 0
    expected = -logp.gather(-1, tokens[..., None])[..., 0][known].mean()
    assert curves[1].development.loss[-1] == pytest.approx(float(expected), rel=1e-5)


WINDOWS = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("config", "masks"),
    [
        (MODEL | {"resid_pdrop": 0.0}, [False, False]),
        ({"model_type": "llama", **SMALL, "num_key_value_heads": 1}, [False, False]),
        ({"model_type": "mistral", "sliding_window": 9, **SMALL}, [False, False]),
        ({"model_type": "mistral", "sliding_window": 4, **SMALL}, [True, True]),
        ({"model_type": "gemma3_text", "sliding_window": 4, **SMALL, **WINDOWS}, [True, False]),
        # Its softcap wants scores, which no fused kernel has: transformers' own attention stays.
        (
            {"model_type": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 0.01, **SMALL, **WINDOWS},
            [],
        ),
    ],
    ids=["gpt2", "llama", "window-of-more-than-a-block", "window-within-a-block", "both-in-turn", "softcap"],
)
def test_a_compiled_model_attends_without_a_mask_where_that_is_the_same(
    config: dict[str, Any], masks: list[bool]
) -> None:
    """Logits and gradients are those of transformers' plain products and softmax."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    fast = build_model(config, random_seed=0)
    fast.load_state_dict(plain.state_dict())
    leave_causal_masks_out(fast)
    masked: list[bool] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        calls = [node for node in graph.graph.nodes if node.target is attend]
        masked.extend(node.kwargs.get("attn_mask") is not None for node in calls)
        return graph.forward

    tokens = torch.randint(64, (2, 8))
    compiled = torch.compile(fast, backend=look, fullgraph=True, dynamic=False)
    logits = [model(input_ids=tokens, use_cache=False).logits for model in (plain, compiled)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-5)
    for one in logits:
        one.square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, fast)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert masked == masks


@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_hand_on_bfloat16_where_passes_are_in_it_and_positions_stay_exact(
    spec: TrainingSpec, recomputes: bool
) -> None:
    losses, seen = {}, []

    def look(_: Any, read: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((read[0].dtype, named["position_embeddings"][0].dtype))

    for precision in ("float32", "bfloat16"):
        compute = replace(spec.compute, precision=precision, recomputes=recomputes)
        of_llama = replace(spec, model={"model_type": "llama", **SMALL}, compute=compute)
        state = build_state(of_llama, ALONE)
        updates = Updates(of_llama, state, ALONE)
        layers_of(state.model)[1].register_forward_pre_hook(look, with_kwargs=True)
        losses[precision] = updates.make().shown.read()[0]
        assert {hidden for hidden, _ in seen} == {getattr(torch, precision)}
        assert {positions for _, positions in seen} == {torch.float32}
        seen.clear()
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=2e-3, atol=0)


def test_a_model_without_layers_or_whose_first_reads_tokens_is_left_as_it_is() -> None:
    tokens = torch.arange(4)
    of_lists = torch.nn.ModuleDict({"parts": torch.nn.ModuleList([torch.nn.Embedding(8, 4)])})
    for model in (of_lists, torch.nn.Linear(4, 4)):
        hand_on_in_bfloat16(model)  # type: ignore[arg-type]
    assert of_lists["parts"][0](tokens).dtype == torch.float32


@pytest.fixture
def with_muon(spec: TrainingSpec) -> TrainingSpec:
    """Muon trains the eight matrices of two layers, AdamW embeddings and vectors."""
    return replace(spec, training=spec.training.model_copy(update={"optimizer": "muon"}))


def test_activations_are_computed_again_by_the_kernels_that_computed_them_first(spec: TrainingSpec) -> None:
    """Left to itself, a CPU attends by FlashAttention, as a GPU that prefers cuDNN for forward passes would."""
    recomputing = replace(spec, compute=replace(spec.compute, recomputes=True))
    losses = []
    for chosen in (nullcontext, partial(sdpa_kernel, SDPBackend.MATH)):
        updates = Updates(recomputing, build_state(recomputing, ALONE), ALONE)
        updates.kernels = chosen
        losses.append(updates.make().shown.read())
    torch.testing.assert_close(losses[1], losses[0])


def test_a_trace_that_cannot_be_written_or_ended_fails_no_training(
    spec: TrainingSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk; and after an error of the GPU, which any call would raise again and so hide."""
    state = build_state(spec, ALONE)
    train(replace(spec, trace_file=tmp_path / "missing" / "trace.json.gz"), state, Recorded(state))
    assert state.update == 4
    assert "no trace of the updates" in caplog.text

    def lost(_: object) -> None:
        raise RuntimeError("device lost")

    trace = Trace(tmp_path / "trace.json.gz", CPU, updates=1)
    trace.update_begins()
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    trace._device = torch.device("cuda")
    trace.give_up()
    trace.write()
    assert not list(tmp_path.glob("trace*"))


def test_muon_takes_orthogonal_steps_of_adamws_size_for_the_matrices_of_layers_alone(
    spec: TrainingSpec, with_muon: TrainingSpec
) -> None:
    before = weights(build_state(spec, ALONE))
    rate = 1e-2
    steps = []
    for one in (spec, with_muon):
        state = build_state(one, ALONE)
        for _, parameter in sorted(state.model.named_parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        state.optimizer.step(rate)
        steps.append(
            {name: (1 - rate * 0.1) * before[name] - after for name, after in weights(state).items()}
        )
    for name, step in steps[1].items():
        if not (name.startswith("transformer.h.") and step.ndim == 2):
            torch.testing.assert_close(step, steps[0][name], rtol=0, atol=0)
            continue
        gains = torch.linalg.svdvals(step) / (rate * 0.2 * max(step.shape) ** 0.5)
        assert 0.6 < gains.min() < gains.max() < 1.3, "of Newton and Schulz, which stop early"
        sizes = [float(taken[name].square().mean().sqrt()) for taken in steps]
        assert 0.1 * sizes[0] < sizes[1] < sizes[0]


def test_muon_takes_the_step_of_each_matrix_of_a_demixs_stack_by_itself(with_muon: TrainingSpec) -> None:
    domains = 3
    demix, *dense = (build_model(with_muon.model, random_seed=0) for _ in range(domains + 1))
    split_feed_forwards(demix, range(domains))
    by_stack = build_optimizer(demix, with_muon.training, is_demix=True)
    by_itself = [build_optimizer(model, with_muon.training) for model in dense]
    stacks = {n.replace(".experts.", "."): p for n, p in demix.named_parameters() if has_row_per_domain(n)}
    for update in range(2):
        torch.manual_seed(update)
        for name, stack in stacks.items():
            stack.grad = torch.randn(stack.shape)
            for model, gradient in zip(dense, stack.grad, strict=True):
                model.get_parameter(name).grad = gradient.clone()
        for optimizer in (by_stack, *by_itself):
            optimizer.step(1e-2)
    assert not any(stack.grad is not None for stack in stacks.values())
    for name, stack in stacks.items():
        for number, (model, optimizer) in enumerate(zip(dense, by_itself, strict=True)):
            own = model.get_parameter(name)
            assert torch.equal(stack[number], own), name
            for moment, expected in optimizer.state_of(own).items():
                found = by_stack.state_of(stack)[moment]
                assert torch.equal(found if moment == "step" else found[number], expected), (name, moment)
    assert {by_stack.moments_of(stack) for stack in stacks.values()} == {
        ("momentum_buffer",),
        ("exp_avg", "exp_avg_sq"),
    }


def test_a_training_by_muon_that_was_stopped_ends_in_the_same_weights(
    with_muon: TrainingSpec, tmp_path: Path
) -> None:
    whole, cut, resumed = (build_state(with_muon, ALONE) for _ in range(3))
    train(with_muon, whole, Recorded(whole))
    with pytest.raises(Stopped):
        train(with_muon, cut, Recorded(cut, stops_at=3))
    write_state(cut, tmp_path, with_optimizer=True)
    stored, moments = (TensorFiles([tmp_path / name]) for name in (WEIGHTS, OPTIMIZER_FILE))
    kinds = Counter(name.partition(".")[0] for name in moments.header)
    assert kinds["momentum_buffer"] == 8
    assert kinds["exp_avg"] == kinds["exp_avg_sq"] == len(weights(cut)) - 8
    load_state(resumed, 3, stored, moments, "a test's state")
    train(with_muon, resumed, Recorded(resumed))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    torch.testing.assert_close(dict(resumed.moments()), dict(whole.moments()), rtol=0, atol=0)
