"""Mixtures of experts: the same predictions as the models that they are made of, in stock architectures; and
through the pipeline, from a plan's verdict to a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from btm_cluster.cli import app, run_command
from btm_cluster.equations.router import best_sharpness, ridge_router
from btm_cluster.errors import IncompatibleError, UserError
from btm_cluster.language_model import routers
from btm_cluster.language_model.compute import autocast
from btm_cluster.language_model.configuration import config_from, plain_config
from btm_cluster.language_model.folder import write_model
from btm_cluster.language_model.loss import read_after
from btm_cluster.language_model.mixture_of_experts import (
    MixtureWeights,
    differ_in_feed_forwards_alone,
    mixture_config,
    size_of_mixture,
)
from btm_cluster.language_model.model import build_model, load_model, save_weights, weights_of
from btm_cluster.language_model.routers import fit_routers
from btm_cluster.language_model.soup import Reading
from btm_cluster.language_model.stored_weights import StoredWeights, TensorFiles, write_shards
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.plan import DONE, preview
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources
from btm_cluster.steps.average import check_compatible
from btm_cluster.steps.stored import open_model
from tests.conftest import in_process

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": None,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA_3},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "olmo2": {},
}
EXPERTS = 3


class Made:
    """A dense model, experts that are copies of it with feed-forwards of their own, and their mixture."""

    def __init__(self, model_type: str, folder: Path) -> None:
        model = build_model({"model_type": model_type, **SHAPE, **ARCHITECTURES[model_type]}, 0)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()  # fresh ones are zero
        self.config = plain_config(model.config)
        self.mixture_config = mixture_config(self.config, EXPERTS, 2)
        self.files = []
        for number in range(EXPERTS + 1):
            for name, parameter in model.named_parameters():
                if number and ".mlp." in name:
                    parameter.data.normal_(std=0.2)
            file = folder / f"{number}.safetensors"
            save_weights(weights_of(model), file)
            self.files.append(TensorFiles([file]))
        self.experts = [load_model(self.config, file).eval() for file in self.files[1:]]
        self.folder = folder

    def mix(self, files: list[TensorFiles], name: str = "mixture") -> TensorFiles:
        """The mixture of some models, with routers drawn at random, as a store has it."""
        routers = [torch.randn(EXPERTS, 32) for _ in range(2)]
        weights = MixtureWeights(self.files[0], files, routers, self.mixture_config)
        to = self.folder / name
        to.mkdir()
        return TensorFiles(list(write_shards(weights, to).values()))

    def open(self, weights: TensorFiles) -> PreTrainedModel:
        return load_model(self.mixture_config, weights).eval()


class OneElse:
    """Stored weights of which one number differs, in the last norm."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights, self.header = weights, weights.header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        tensor = self._weights.read(name, device).clone()
        if name == "model.norm.weight":
            tensor[-1] += 1e-3
        return tensor


@pytest.fixture(params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return Made(request.param, tmp_path)


def logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(SHAPE["vocab_size"], (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def route_to(mixture: PreTrainedModel, expert: int) -> None:
    """Makes the routers of a mixture one-hot."""

    def only(_: Any, __: Any, routed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scores, weights, _ = routed
        one = torch.ones_like(weights[:, :1])
        return scores, one, torch.full_like(one, expert, dtype=torch.int64)

    for layer in mixture.model.layers:
        layer.mlp.gate.register_forward_hook(only)


def test_with_a_one_hot_router_a_mixture_is_each_expert(made: Made) -> None:
    assert differ_in_feed_forwards_alone(made.files[0], made.files[1:])
    assert not differ_in_feed_forwards_alone(made.files[0], [made.files[1], OneElse(made.files[2])])
    weights = made.mix(made.files[1:])
    for number, expert in enumerate(made.experts):
        mixture = made.open(weights)
        route_to(mixture, number)
        # A rounding apart: two of three matrices are multiplied as one.
        torch.testing.assert_close(logits(mixture), logits(expert), rtol=0, atol=1e-6)
    assert (logits(made.experts[0]) - logits(made.experts[1])).abs().max() > 0.1


def test_the_weights_of_a_tokens_experts_sum_to_one(made: Made) -> None:
    alike = made.open(made.mix([made.files[1]] * EXPERTS))
    torch.testing.assert_close(logits(alike), logits(made.experts[0]), rtol=0, atol=1e-6)


def test_transformers_opens_what_is_published(made: Made) -> None:
    weights, to = made.mix(made.files[1:]), made.folder / "published"
    to.mkdir()
    config = config_from(made.mixture_config)
    config.architectures = [type(made.open(weights)).__name__]
    config.save_pretrained(made.folder)
    write_model(made.folder / "config.json", weights, to, shard_bytes=20_000)
    assert len(list(to.glob("*.safetensors"))) > 1
    opened, loading = AutoModelForCausalLM.from_pretrained(
        to, output_loading_info=True, trust_remote_code=False
    )
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits(opened.eval()), logits(made.open(weights)), rtol=0, atol=0)
    names = json.loads((to / "model.safetensors.index.json").read_text())["weight_map"]
    expert = "block_sparse_moe.experts.2.w2" if config.model_type == "mixtral" else "mlp.experts.2.down_proj"
    assert f"model.layers.1.{expert}.weight" in names
    said = opened.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said.shape == (1, 7)


def test_a_mixture_counts_the_parameters_that_a_token_passes(made: Made) -> None:
    expert = 2 * 3 * 32 * 48
    size = size_of_mixture(made.config, EXPERTS, 2)
    assert size.parameters == sum(p.numel() for p in made.open(made.mix(made.files[1:])).parameters())
    assert size.parameters - size.active_parameters == expert
    one = size_of_mixture(made.config, EXPERTS, 1)
    embeddings = 96 * 32 * (1 if made.config["tie_word_embeddings"] else 2)
    dense = sum(p.numel() for p in made.experts[0].parameters()) - embeddings
    assert size.inference_cost - one.inference_cost == pytest.approx(expert / dense)


def test_what_no_stock_architecture_can_hold_is_refused() -> None:
    llama = {"model_type": "llama", **SHAPE}
    for config, experts_per_token, part in (
        ({"model_type": "gpt2"}, 2, "a gpt2 has no mixture of experts: no stock architecture has its layers"),
        (llama | {"attention_bias": True}, 2, "attention_bias: True"),
        (llama | {"hidden_act": "gelu"}, 2, "hidden_act: gelu"),
        (llama, 4, "4 of 3"),
    ):
        with pytest.raises(UserError, match=part):
            mixture_config(config, EXPERTS, experts_per_token)


def of_words(first: int, blocks: int) -> Reading:
    """Blocks of eight words."""
    tokens = torch.randint(first, first + 8, (blocks, 16), generator=torch.Generator().manual_seed(first))
    return Reading(tokens, torch.ones(blocks, 16, dtype=torch.bool))


def test_routers_tell_domains_of_other_words_apart() -> None:
    model = build_model({"model_type": "llama", **SHAPE}, 0)
    readings = [of_words(8, 10), of_words(40, 20), of_words(72, 1)]
    how = Resources(1, 0, 1, 4, "float32", compile=False)
    counted: list[int] = []
    fitted = fit_routers(model, readings, 0, how, counted.append)
    assert sum(counted) == 10 + 20 + 2  # the only block of the last one is read twice
    for router in fitted:
        assert router.weights_EH.shape == (3, 32)
        assert router.accuracy > 0.9  # a block's first token is read after the same one everywhere
        assert router.sharpness > 3
    again = fit_routers(model, readings, 0, how)
    assert all(torch.equal(a.weights_EH, b.weights_EH) for a, b in zip(fitted, again, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_router_is_the_regression_in_float64_whatever_the_model_is_computed_in(precision: str) -> None:
    """Gram matrices were products in bfloat16 where the model was: with an outlier channel, as large models have,
    none that the regression could use."""
    model = build_model({"model_type": "llama", **SHAPE}, 0).eval()
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data[3] = 300
    readings = [of_words(8, 1), of_words(40, 1)]  # one block each, which is learned from and held out
    gram_HH, sums_EH = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(2, 32, dtype=torch.float64)

    for expert, reading in enumerate(readings):
        seen: list[torch.Tensor] = []
        handle = model.model.layers[1].mlp.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0][0].double())
        )
        with torch.no_grad(), autocast(torch.device("cpu"), precision):
            model(read_after(reading.tokens_BT, 0))
        handle.remove()
        gram_HH += seen[0].T @ seen[0] / 16
        sums_EH[expert] = seen[0].mean(0)
    fitted = fit_routers(model, readings, 0, Resources(1, 0, 1, 4, precision, compile=False))[1]
    expected_EH = fitted.sharpness * ridge_router(gram_HH, sums_EH)
    torch.testing.assert_close(fitted.weights_EH.double(), expected_EH, rtol=1e-3, atol=1e-5)


def test_a_sharpness_is_fitted_on_as_many_tokens_as_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores of all held-out tokens were held at once, for every layer: 43 GB at 64 experts."""
    model = build_model({"model_type": "llama", **SHAPE}, 0)
    readings = [
        of_words(8, 10),
        of_words(12, 20),
    ]  # that share words, so that the sharpness depends on tokens
    how = Resources(1, 0, 1, 4, "float32", compile=False)
    scored: list[torch.Tensor] = []

    def fit(scores_NE: torch.Tensor, experts_N: torch.Tensor, weights_N: torch.Tensor) -> float:
        scored.append(experts_N)
        return best_sharpness(scores_NE, experts_N, weights_N)

    monkeypatch.setattr(routers, "best_sharpness", fit)
    whole = fit_routers(model, readings, 0, how)
    assert [experts_N.bincount().tolist() for experts_N in scored] == [[2 * 16, 4 * 16]] * 2
    monkeypatch.setattr(routers, "SCORED_TOKENS", 80)
    sampled, again = (fit_routers(model, readings, 0, how) for _ in range(2))
    assert [experts_N.bincount().tolist() for experts_N in scored[2:]] == [[32, 40]] * 4
    for one, other, same in zip(whole, sampled, again, strict=True):
        assert (other.sharpness, other.accuracy) == (same.sharpness, same.accuracy)
        assert other.sharpness == pytest.approx(one.sharpness, rel=0.5)
        assert other.sharpness != one.sharpness


def mixtures(ledger: Ledger) -> list[Artifact]:
    return [one for one in ledger.list_artifacts("model") if one.facts.get("role") == "mixture-of-experts"]


def test_a_mixture_stands_in_the_verdict_and_is_what_is_exported(
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Experts differ in feed-forwards alone: it is exact. There are fewer of them than the plan's experts for a
    token, which verdict and export take alike; only the option was given for this forest."""
    fields["domains"] = fields["domains"][:2]
    fields["model"] = {"config": {"model_type": "llama"} | {k: SHAPE[k] for k in list(SHAPE)[1:6]}}
    fields["training"] |= {"learning_rate": 1e-2}
    fields["branching"] = {"train": "feed-forward"}
    fields["merging"] = {"mixture_of_experts": {"experts_per_token": 3}}
    plan = Plan.model_validate(fields)
    run = run_plan(plan, in_process(plan))
    ledger = Ledger.open(plan.store)
    (mixture,) = mixtures(ledger)
    (step,) = [
        step for step in preview(plan, ledger).steps if step.name == "mixture of experts with the seed"
    ]
    stored = sum(blob.size_bytes for blob in mixture.blobs if blob.name.endswith(".safetensors"))
    assert (step.state, step.device_hours) == (DONE, 0)
    assert step.stored_bytes < stored < step.stored_bytes + 10_000, "and a header"
    row = next(row for row in run.verdict.rows["test"] if row.system == "mixture of experts, top-2")
    assert row.inference_cost == mixture.facts["inference_cost"] > 1
    assert row.cells.keys() == {"kitchen", "harbour", "market"}
    assert [one.system for one in run.verdict.judgements if one.kind == "mixture of experts"] == [row.system]
    assert " as a mixture of experts: " in run.verdict.sentence
    assert mixture.facts["is_exact"]
    for number, expert in enumerate(mixture.inputs["models"]):
        opened = open_model(ledger, mixture).eval()
        route_to(opened, number)
        own = logits(open_model(ledger, expert).eval())
        torch.testing.assert_close(logits(opened), own, rtol=0, atol=1e-6)
    with pytest.raises(IncompatibleError, match=r"another config\.json"):
        check_compatible(ledger, [mixture, ledger.get(Ref("model", run.forest.experts[0].identity))])

    to, path = tmp_path / "mixture", write_plan(fields)

    def export(*options: str) -> tuple[int, str]:
        call = ["export", str(path), "--in-process", "--moe", "--to", str(to), *options]
        code = run_command(lambda: app(call, standalone_mode=False))
        return code, capsys.readouterr().err

    code, told = export("--experts-per-token", "3")
    assert (code, to.exists()) == (2, False)
    assert "at most 2" in told
    code, told = export()
    assert code == 0, told
    assert mixtures(ledger) == [mixture]
    published = AutoModelForCausalLM.from_pretrained(to, trust_remote_code=False)
    assert type(published).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(
        logits(published.eval()), logits(open_model(ledger, mixture).eval()), rtol=0, atol=0
    )
    card = (to / "README.md").read_text()
    assert "A mixture of the feed-forwards of 2 experts" in card
    assert "The experts differ in feed-forwards alone" in card
    numbered = {one.identity: one.domain for one in run.forest.experts}
    for number, expert in enumerate(mixture.inputs["models"]):
        assert f"| expert {number}: {numbered[expert.identity]} | `{expert.identity}` |" in card
    assert "| market |" in card


def test_a_mixture_that_cannot_be_made_is_refused_before_a_text_is_read(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields | {"merging": {"mixture_of_experts": {}}})
    with pytest.raises(UserError, match="a gpt2 has no mixture of experts"):
        run_plan(plan, in_process(plan))
    assert not list(Ledger.open(plan.store).list_artifacts("source"))
