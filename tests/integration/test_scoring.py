"""Stored scores against float64 forward passes of the same weights, and what scoring must not depend on."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from btm_cluster.data.blocks import Blocks
from btm_cluster.driver.port import Failure
from btm_cluster.driver.recipes import expert_resources, score_request
from btm_cluster.errors import TrainingError
from btm_cluster.language_model.model import load_model
from btm_cluster.language_model.scoring import _entropy, score_blocks, score_tokens
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.requests import Resources
from btm_cluster.steps.stored import open_config, open_model
from tests.conftest import in_process, run_all
from tests.integration.conftest import GrownForest, copy_store
from tests.integration.test_mixture import distributions
from tests.made import origin


def stored(grown: GrownForest, model: Artifact, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and stored scores of a split under a model."""
    ledger, text = grown.driver.ledger, grown.text(name)
    scores = ledger.get(score_request(grown.prepared, model.ref, text, split, "").ref)
    shards = [np.load(ledger.open_file(ledger.get(ref), "tokens.npy")) for ref in text.tokens[split]]
    return np.concatenate(shards), np.load(ledger.open_file(scores, "logp.npy"))


def models_of(grown: GrownForest) -> dict[str, Artifact]:
    """A model of each kind: all of them are scored by the same verb."""
    assert grown.grown.baseline is not None
    refs = {
        "seed": Ref("model", grown.grown.forest.foundation.seed),
        "expert": grown.experts[0].ref,
        "transformer-lm": grown.grown.baseline,
        "average": grown.averages["uniform"],
    }
    return {name: grown.driver.ledger.get(ref) for name, ref in refs.items()}


@pytest.mark.parametrize("kind", ["seed", "expert", "transformer-lm", "average"])
def test_stored_scores_are_the_log_probabilities_of_a_float64_forward_pass(
    grown: GrownForest, kind: str
) -> None:
    model = models_of(grown)[kind]
    tokens_BT, scores_BT = stored(grown, model, "market", "test")
    assert scores_BT.shape == tokens_BT.shape
    assert scores_BT.dtype == np.float32
    rows = [0, 1, len(tokens_BT) - 1]
    p_BTV = distributions(grown.driver.ledger, model, tokens_BT[rows])
    expected = p_BTV.gather(-1, torch.from_numpy(tokens_BT[rows].astype(np.int64))[..., None])[..., 0].log()
    np.testing.assert_allclose(scores_BT[rows], expected.numpy(), rtol=1e-5)


@pytest.fixture
def scored(grown: GrownForest) -> tuple[torch.nn.Module, Blocks, int, Resources]:
    """An expert, the test blocks of a target, the end-of-text token, and how to score."""
    ledger = grown.driver.ledger
    config = open_config(ledger, grown.experts[0])
    model = open_model(ledger, grown.experts[0])
    files = [ledger.open_file(ledger.get(ref), "tokens.npy") for ref in grown.text("market").tokens["test"]]
    return model, Blocks(files), config["eos_token_id"], expert_resources(grown.prepared.plan)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_each_block_is_scored_on_its_own_however_many_are_scored_at_once(
    scored: tuple[torch.nn.Module, Blocks, int, Resources], tmp_path: Path, at_once: int
) -> None:
    model, blocks, end_of_text, how = scored
    other_how = dataclasses.replace(how, micro_batch_blocks=at_once)
    usual, other = (
        {
            name: np.load(file)
            for name, file in score_blocks(model, blocks, end_of_text, one, folder(tmp_path, i)).items()
        }
        for i, one in enumerate((how, other_how))
    )
    for name in ("logp.npy", "entropy.npy"):
        assert other[name].shape == (len(blocks), 32)
        np.testing.assert_allclose(other[name], usual[name], rtol=1e-5, atol=1e-5)


def folder(parent: Path, number: int) -> Path:
    made = parent / str(number)
    made.mkdir()
    return made


def test_entropies_are_those_of_a_float64_forward_pass_and_need_not_know_the_token(
    grown: GrownForest, scored: tuple[torch.nn.Module, Blocks, int, Resources], tmp_path: Path
) -> None:
    model, blocks, end_of_text, how = scored
    tokens_BT = blocks.take(np.arange(len(blocks)))
    p_BTV = distributions(grown.driver.ledger, grown.experts[0], tokens_BT[:2])
    expected = torch.special.entr(p_BTV).sum(-1)
    entropy_BT = np.load(score_blocks(model, blocks, end_of_text, how, tmp_path)["entropy.npy"])
    np.testing.assert_allclose(entropy_BT[:2], expected.numpy(), rtol=1e-4)
    after = torch.from_numpy(tokens_BT[:1].copy())
    after[0, 20] = (after[0, 20] + 7) % 320
    changed_BT = score_tokens(model.eval(), after, end_of_text, how)[1]
    np.testing.assert_allclose(changed_BT[0, :21], entropy_BT[0, :21], rtol=1e-5)


def test_a_token_changes_no_score_before_it_and_none_of_another_block(
    scored: tuple[torch.nn.Module, Blocks, int, Resources],
) -> None:
    model, blocks, end_of_text, how = scored
    before = torch.from_numpy(blocks.take(np.arange(3)))
    after = before.clone()
    after[1, 20] = (after[1, 20] + 7) % 320
    first, second = (score_tokens(model.eval(), b, end_of_text, how)[0] for b in (before, after))
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert torch.equal(first[1, :20], second[1, :20])
    assert (first[1, 20:] != second[1, 20:]).all()


def test_the_first_token_is_predicted_from_the_end_of_text_token_alone(
    scored: tuple[torch.nn.Module, Blocks, int, Resources],
) -> None:
    model, blocks, end_of_text, how = scored
    tokens_BT = torch.from_numpy(blocks.take(np.arange(4)))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[end_of_text]])).logits[0, 0]
    expected = torch.log_softmax(logits, dim=-1)[tokens_BT[:, 0]]
    torch.testing.assert_close(score_tokens(model, tokens_BT, end_of_text, how)[0][:, 0], expected)


def test_bfloat16_arithmetic_still_gives_float32_scores_close_to_the_exact_ones(
    scored: tuple[torch.nn.Module, Blocks, int, Resources], tmp_path: Path
) -> None:
    model, blocks, end_of_text, how = scored
    in_bfloat16 = dataclasses.replace(how, precision="bfloat16")
    exact, rough = (
        np.load(score_blocks(model, blocks, end_of_text, one, folder(tmp_path, i))["logp.npy"])
        for i, one in enumerate((how, in_bfloat16))
    )
    assert rough.dtype == np.float32
    assert np.abs(rough - exact).mean() < 0.02
    assert len(np.unique(rough)) > 1000, "rounded to bfloat16, there would be only some hundred values"


def test_a_model_that_diverged_is_a_failure_that_says_so_and_stores_no_scores(
    grown: GrownForest, tmp_path: Path
) -> None:
    # Its sum of log-probabilities, nan, used to break the manifest instead: "Out of range float values are
    # not JSON".
    driver = in_process(copy_store(grown.prepared.plan, tmp_path / "store"))
    ledger = driver.ledger
    weights = load_file(ledger.open_file(grown.experts[0], "model.safetensors"))
    weights["transformer.wte.weight"][5] = math.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files = {name: ledger.open_file(grown.experts[0], name) for name in ("config.json", "tokenizer.json")}
    files["model.safetensors"] = tmp_path / "model.safetensors"
    diverged = ledger.commit(origin("model", {}), files, {})
    request = score_request(grown.prepared, diverged.ref, grown.text("market"), "test", "a model")
    (outcome,) = run_all(driver.workers, [request])
    assert isinstance(outcome, Failure)
    assert "not finite" in outcome.cause
    assert ledger.find(request.ref) is None
    model = load_model(open_config(ledger, diverged), TensorFiles([tmp_path / "model.safetensors"]))
    blocks = Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in request.tokens])
    with pytest.raises(TrainingError):
        score_blocks(model, blocks, 0, request.how, tmp_path)


def test_a_token_that_a_model_rules_out_adds_nothing_to_an_entropy() -> None:
    logp_NV = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, -math.inf]]), dim=-1)
    expected = [float(-sum(p * math.log(p) for p in row.exp().tolist() if p)) for row in logp_NV]
    assert _entropy(logp_NV).tolist() == pytest.approx(expected)
    assert _entropy(logp_NV[:1]).tolist() == pytest.approx(expected[:1])
