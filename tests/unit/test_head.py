"""A head that is applied a few tokens at a time gives what it gives to all of them at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.data.blocks import Blocks
from btm_cluster.language_model import head, loss, scoring
from btm_cluster.language_model.head import plain_head
from btm_cluster.language_model.loss import NO_TOKEN, NextTokenLoss
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.scoring import score_blocks
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import build_state
from btm_cluster.language_model.update import Updates
from btm_cluster.requests import Resources
from tests.unit.test_train_loop import spec  # noqa: F401 (a fixture)

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True, **SHAPE},
    "untied": {"model_type": "olmo2", **SHAPE},
    "with-a-bias": {"model_type": "phi", **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2},
}


def model_of(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=60)).eval()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": 5 * 60})


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(name: str, precision: torch.dtype) -> None:
    tokens = torch.randint(60, (2, 9))
    targets = torch.randint(60, (2, 9))
    targets[0, 3:5] = NO_TOKEN
    found = []
    for in_pieces in (False, True):
        model = model_of(MODELS[name])
        next_token = NextTokenLoss(model, plain_head(model) if in_pieces else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            value = next_token(tokens, targets)
        (value / 3).backward()
        found.append((value.detach(), {n: p.grad for n, p in next_token.named_parameters()}))
    close = {} if precision == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(*found, **close)


def test_a_frozen_head_has_no_gradient() -> None:
    model = model_of(MODELS["untied"])
    model.lm_head.weight.requires_grad_(False)
    tokens = torch.randint(60, (1, 9))
    NextTokenLoss(model, plain_head(model))(tokens, tokens).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.abs().sum() > 0


def test_logits_that_are_more_than_the_heads_outputs_are_taken_whole() -> None:
    capped = model_of({"model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2, **SHAPE})
    scaled = model_of({"model_type": "granite", "logits_scaling": 2.0, **SHAPE})
    assert plain_head(capped) is None
    assert plain_head(scaled) is None
    assert plain_head(model_of(MODELS["gpt2"])) is not None


def test_training_takes_pieces_where_a_block_has_too_many_logits(
    spec: TrainingSpec,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = ProcessGroup(0, 1, torch.device("cpu"))
    spec = replace(spec, model=spec.model | {"resid_pdrop": 0.0})
    made = []
    for most in (8 * 64, 8 * 64 - 1):
        monkeypatch.setattr(loss, "LARGEST_BLOCK_LOGITS", {"cpu": most})
        updates = Updates(spec, build_state(spec, alone), alone)
        made.append(updates.make())
        assert (updates.head is None) == (most == 8 * 64)
    torch.testing.assert_close(made[0].shown.read(), made[1].shown.read())


@pytest.mark.parametrize("most", [9 * 60 * 2, 9 * 60 - 1], ids=["fewer-blocks", "pieces"])
def test_scores_are_the_same_however_many_logits_are_held(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(60, size=(5, 9), dtype=np.uint16))
    model, how = model_of(MODELS["untied"]), Resources(1, 0, 1, 4, "float32", False)
    found = []
    for name in ("whole", "limited"):
        (tmp_path / name).mkdir()
        files = score_blocks(model, Blocks([tmp_path / "tokens.npy"]), 0, how, tmp_path / name)
        found.append([np.load(file) for file in files.values()])
        monkeypatch.setattr(scoring, "MODELS_LOGITS_AT_ONCE", {"cpu": most})
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("free", "share", "blocks"),
    [(40e9, 1.0, 32), (4e9, 1.0, 13), (40e9, 0.1, 27), (1e6, 1.0, 0)],
    ids=["as-many-as-keep-it-busy", "little-memory", "a-tenth-of-it", "none"],
)
def test_a_pass_of_scoring_takes_what_half_of_the_gpus_free_memory_holds(
    free: float, share: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "mem_get_info": (free, 80e9),
        "memory_reserved": 3e6,
        "memory_allocated": 2e6,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=value: answer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2"))
    how = Resources(1, share, 1, 4, "bfloat16", True)
    found = scoring._blocks_by_memory(model, how, 1024)
    assert found == blocks
    per_token = 2 * model.config.vocab_size + 4 * (4 + 1 + 2) * 768 + 3 * 2 * 4 * 768
    usable = 0.5 * min(free + 1e6, share * 80e9)
    assert found * 1024 * per_token <= usable
    assert (found + 1) * 1024 * per_token > usable or found == 32


@pytest.mark.parametrize(
    ("texts", "at_once", "is_worth"),
    [
        ([512, 512], 256, True),
        ([32] * 8, 32, True),
        ([300], 150, True),
        ([300, *[10] * 40], 150, False),
        ([2], 2, False),
    ],
    ids=["long", "short", "cut-evenly", "mostly-filled-up", "little"],
)
def test_passes_are_compiled_where_there_is_enough_to_score_and_little_to_fill_up(
    texts: list[int], at_once: int, is_worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MODELS["gpt2"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(scoring, "WORTH_COMPILING", 3 * 9 * parameters)
    how = Resources(1, 1, 1, 4, "bfloat16", True)
    assert scoring._blocks_of_even_passes(texts, most=256) == at_once
    assert scoring._is_worth_compiling(model, how, 9, texts, at_once) == is_worth
    assert not scoring._is_worth_compiling(model, replace(how, gpus_per_worker=0), 9, texts, at_once)


def test_compiled_passes_are_of_one_shape_and_give_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts with fewer blocks, or a last pass that is not full."""
    graphs: list[int] = []
    compiles = torch.compile

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda made, dynamic: compiles(made, backend=count, dynamic=dynamic)
    )
    scoring.fused_said.cache_clear()
    how, found = Resources(1, 0, 1, 4, "float32", True), []
    model = model_of(MODELS["untied"])
    for is_compiled in (False, True):
        monkeypatch.setattr(scoring, "_is_worth_compiling", lambda *_, answer=is_compiled: answer)
        passes = scoring.ScorePasses(model, how, block_tokens=9, texts=(7, 1))
        assert passes.at_once == 4
        for number in (7, 1):
            folder = tmp_path / f"{is_compiled}-{number}"
            folder.mkdir()
            tokens = np.random.default_rng(number).integers(60, size=(number, 9), dtype=np.uint16)
            np.save(folder / "tokens.npy", tokens)
            counted: list[int] = []
            files = passes.write(Blocks([folder / "tokens.npy"]), 0, folder, counted.append)
            assert sum(counted) == number
            found.append([np.load(file) for file in files.values()])
    for plain, compiled in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-5)
    assert len(graphs) == 2, "a layer, and the log-probabilities"
    scoring.fused_said.cache_clear()
