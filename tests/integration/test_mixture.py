"""The ensemble against a mixture over full next-token distributions of real
models, and what is summed and resampled."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.equations import perplexity as of_perplexity
from btm_cluster.equations.mixture import (
    document_sums,
    ends_of_documents,
    log_mixture,
)
from btm_cluster.equations.perplexity import (
    BYTES,
    TOKENS,
    bits_per_byte,
    interval,
    perplexity,
    resampled_perplexity,
)
from btm_cluster.equations.posterior import Posterior, keep_top
from btm_cluster.evaluation.scoring import score_models, scored_split
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.mixing.scores import BLOCKS_AT_ONCE, ScoreStack
from btm_cluster.steps.stored import open_tokenizer
from tests.integration.conftest import GrownForest
from tests.made import origin

POSTERIORS = [
    Posterior("full"),
    Posterior("last-token"),
    Posterior("window", window_tokens=5),
    Posterior("calibrated", discount=0.97, weight=0.22),
]


def distributions(ledger: Ledger, model: Artifact, tokens_BT: np.ndarray) -> torch.Tensor:
    """p(v | x_<t) over the whole vocabulary, [B, T, V] in float64, from the
    stored files and transformers alone."""
    fields = json.loads(ledger.open_file(model, "config.json").read_text())
    float64 = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).double().eval()
    weights = {
        name: t.double() for name, t in load_file(ledger.open_file(model, "model.safetensors")).items()
    }
    missing = float64.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    float64.tie_weights()
    blocks = torch.from_numpy(tokens_BT.astype(np.int64))
    read = torch.cat([torch.full((len(blocks), 1), fields["eos_token_id"]), blocks], dim=1)[:, :-1]
    with torch.no_grad():
        return torch.softmax(float64(input_ids=read).logits, dim=-1)


def brute_force_mixture(
    p_EBTV: torch.Tensor, tokens_BT: np.ndarray, prior_E: torch.Tensor, posterior: Posterior
) -> torch.Tensor:
    """p(v | x_<t) of the ensemble, [B, T, V]: Bayes' rule coded position by
    position, starting afresh in each block."""
    experts, blocks, tokens, vocabulary = p_EBTV.shape
    mixed = torch.empty(blocks, tokens, vocabulary, dtype=torch.float64)
    for b in range(blocks):
        seen: list[torch.Tensor] = []
        for t in range(tokens):
            if posterior.kind == "last-token":
                past = seen[-1:]
            elif posterior.kind == "window":
                past = seen[-posterior.window_tokens :]
            else:
                past = seen
            log_likelihood_E = torch.zeros(experts, dtype=torch.float64)
            for age, log_p_E in enumerate(reversed(past)):
                factor = posterior.discount**age if posterior.kind == "calibrated" else 1.0
                log_likelihood_E = log_likelihood_E + posterior.weight * factor * log_p_E
            weights_E = prior_E * torch.exp(log_likelihood_E - log_likelihood_E.max())
            weights_E = weights_E / weights_E.sum()
            mixed[b, t] = sum(weights_E[j] * p_EBTV[j, b, t] for j in range(experts))
            seen.append(p_EBTV[:, b, t, int(tokens_BT[b, t])].log())
    return mixed


@pytest.fixture(scope="module")
def full_distributions(grown: GrownForest) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
    """Some test blocks, the last and padded one among them, and every expert's
    distributions on them, of two texts."""
    ledger = grown.driver.ledger
    result = {}
    for name in ("harbour", "market"):
        shards = [ledger.get(ref) for ref in grown.text(name).tokens["test"]]
        tokens_BT = np.concatenate([np.load(ledger.open_file(shard, "tokens.npy")) for shard in shards])
        tokens_BT = np.concatenate([tokens_BT[:3], tokens_BT[-1:]])
        result[name] = tokens_BT, torch.stack([distributions(ledger, e, tokens_BT) for e in grown.experts])
    return result


def stack_of(grown: GrownForest, text: PreparedText, split: str) -> ScoreStack:
    """The experts' stored scores on a split."""
    experts = [artifact.ref for artifact in grown.experts]
    score_models(grown.prepared, dict.fromkeys(experts, "an expert"), [text], grown.driver, [split])
    return ScoreStack.of(grown.driver.ledger, scored_split(experts, text, split))


@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda p: p.kind)
@pytest.mark.parametrize("name", ["harbour", "market"])
def test_the_ensembles_scores_are_those_of_a_mixture_over_full_distributions(
    grown: GrownForest,
    full_distributions: dict[str, tuple[np.ndarray, torch.Tensor]],
    name: str,
    posterior: Posterior,
) -> None:
    tokens_BT, p_EBTV = full_distributions[name]
    prior_E = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mixed_BTV = brute_force_mixture(p_EBTV, tokens_BT, prior_E, posterior)
    expected_BT = mixed_BTV.gather(-1, torch.from_numpy(tokens_BT.astype(np.int64))[..., None])[..., 0].log()
    stack = stack_of(grown, grown.text(name), "test")
    for start, stop, rows in ((0, 3, slice(0, 3)), (len(stack) - 1, len(stack), slice(3, 4))):
        logp_EBT, mask_BT = stack.take(start, stop)
        found_BT = log_mixture(logp_EBT, prior_E.log(), posterior)
        torch.testing.assert_close(found_BT[mask_BT], expected_BT[rows][mask_BT], rtol=1e-5, atol=0)


@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda p: p.kind)
def test_the_ensembles_probabilities_over_the_vocabulary_sum_to_one(
    full_distributions: dict[str, tuple[np.ndarray, torch.Tensor]], posterior: Posterior
) -> None:
    # Every token of the vocabulary in turn as the last one of a block, scored by the product's own
    # arithmetic.
    tokens_BT, p_EBTV = full_distributions["market"]
    vocabulary, length = p_EBTV.shape[-1], 9
    history_ET = p_EBTV[:, 0, range(length), tokens_BT[0, :length].astype(int)].log()
    logp_EVT = history_ET[:, None].expand(-1, vocabulary, -1)
    logp_EVT = torch.cat([logp_EVT, p_EBTV[:, 0, length].log()[:, :, None]], dim=-1)
    mixed_VT = log_mixture(logp_EVT, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log(), posterior)
    assert float(mixed_VT[:, -1].exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_top_1_ensemble_is_that_expert(grown: GrownForest) -> None:
    stack = stack_of(grown, grown.text("harbour"), "test")
    one_hot = keep_top(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log(), 1)
    for posterior in POSTERIORS:
        torch.testing.assert_close(
            stack.mixture_sums(one_hot, posterior), stack.sums()[0], rtol=1e-12, atol=0
        )


def test_the_reported_ensemble_is_the_sum_over_tokens_of_each_document(grown: GrownForest) -> None:
    text = grown.text("orchard")
    stack = stack_of(grown, text, "test")
    prior_E = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    logp_EBT, _ = stack.take(0, len(stack))
    token_BT = log_mixture(logp_EBT, prior_E.log(), POSTERIORS[0])
    tokens_BT = np.concatenate(
        [
            np.load(grown.driver.ledger.open_file(grown.driver.ledger.get(ref), "tokens.npy"))
            for ref in text.tokens["test"]
        ]
    )
    end = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer).end_of_text
    expected = np.zeros((2, int(stack.documents_BT.max() + 1)))
    for b, t in np.ndindex(*stack.documents_BT.shape):
        if stack.documents_BT[b, t] >= 0:
            expected[TOKENS, stack.documents_BT[b, t]] += float(token_BT[b, t])
            expected[BYTES, stack.documents_BT[b, t]] += float(token_BT[b, t]) * (tokens_BT[b, t] != end)
    assert expected.shape[1] == text.facts["splits"]["test"]["documents"]
    np.testing.assert_allclose(stack.mixture_sums(prior_E.log(), POSTERIORS[0]).numpy(), expected, rtol=1e-12)


# Scores of many blocks and shards, written by hand into a real store


def commit_split(
    ledger: Ledger, folder: str, shards: list[np.ndarray], scores_EBT: np.ndarray
) -> tuple[list[Artifact], list[Ref]]:
    """Stores shards of document numbers, and E models' scores of all their blocks."""
    refs, models = [], []
    for i, owners_BT in enumerate(shards):
        path = Path(folder, f"documents-{i}.npy")
        np.save(path, owners_BT)
        sizes = Path(folder, f"bytes-{i}.npy")
        np.save(sizes, 100 * i + np.arange(owners_BT.max() + 1))
        files = {"documents.npy": path, "bytes.npy": sizes}
        refs.append(ledger.commit(origin("tokens", {"shard": i}), files, {}).ref)
    for i, scores_BT in enumerate(scores_EBT):
        path = Path(folder, f"logp-{i}.npy")
        np.save(path, scores_BT.astype(np.float32))
        models.append(ledger.commit(origin("scores", {"model": i}), {"logp.npy": path}, {}))
    return models, refs


def cut_into_blocks(lengths: list[int], block_tokens: int) -> np.ndarray:
    """Document numbers [B, T] of documents of those lengths, packed, the last block padded."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    missing = -len(owners) % block_tokens
    return np.concatenate([owners, np.full(missing, -1)]).astype(np.int32).reshape(-1, block_tokens)


@pytest.fixture
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScoreStack, list[np.ndarray], np.ndarray]:
    """Three models on two shards; documents span blocks, and the boundary
    between what is held in memory at once."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(1)
    shards = [
        cut_into_blocks(list(rng.integers(1, 30, size=60)), 8),
        cut_into_blocks(list(rng.integers(1, 30, 40)), 8),
    ]
    blocks = sum(len(shard) for shard in shards)
    assert len(shards[0]) > BLOCKS_AT_ONCE
    assert shards[0][BLOCKS_AT_ONCE - 1, -1] == shards[0][BLOCKS_AT_ONCE, 0], (
        "a document must span the boundary"
    )
    assert -1 in shards[0][-1], "padding inside the text, at the end of its first shard"
    scores = -rng.exponential(3.0, size=(3, blocks, 8))
    models, refs = commit_split(Ledger.open(str(folder / "store")), str(folder), shards, scores)
    return ScoreStack(Ledger.open(str(folder / "store")), models, refs), shards, scores.astype(np.float32)


def test_a_document_that_spans_blocks_is_one_document_and_shards_are_numbered_through(
    two_shards: tuple[ScoreStack, list[np.ndarray], np.ndarray],
) -> None:
    stack, shards, scores = two_shards
    expected_tokens, expected, last = np.zeros(100), np.zeros((3, 100)), np.zeros((3, 100))
    row = 0
    for shard, first in zip(shards, (0, 60), strict=True):
        for owners in shard:
            for t, owner in enumerate(owners):
                if owner >= 0:
                    expected_tokens[first + owner] += 1
                    expected[:, first + owner] += scores[:, row, t]
                    last[:, first + owner] = scores[:, row, t]
            row += 1
    np.testing.assert_array_equal(stack.sizes()[TOKENS].numpy(), expected_tokens)
    assert stack.sizes()[BYTES].tolist() == [*range(60), *range(100, 140)]
    assert stack.sums().shape == (3, 2, 100)
    np.testing.assert_allclose(stack.sums()[:, TOKENS].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(stack.sums()[:, BYTES].numpy(), expected - last, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_hold_no_more_than_the_result_and_a_few_blocks_documents(
    two_shards: tuple[ScoreStack, list[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    """Each part had the length of the text up to it, and all were kept: 16 GB for a thousand experts."""
    stack, _, _ = two_shards
    expected = stack.sums()
    lengths: list[int] = []

    def document_sums_noted(logp_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
        found = document_sums(logp_BT, documents_BT)
        lengths.append(len(found))
        return found

    monkeypatch.setattr("btm_cluster.mixing.scores.document_sums", document_sums_noted)
    monkeypatch.setattr("btm_cluster.mixing.scores.BLOCKS_AT_ONCE", 1)
    monkeypatch.setattr(stack, "_threads", threads)
    torch.testing.assert_close(stack.sums(), expected, rtol=1e-13, atol=0)
    assert len(lengths) == 3 * len(stack)
    assert max(lengths) <= stack.documents_BT.shape[1]


@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda p: p.kind)
def test_streaming_by_blocks_changes_no_ensemble(
    two_shards: tuple[ScoreStack, list[np.ndarray], np.ndarray], posterior: Posterior
) -> None:
    stack, _, _ = two_shards
    prior_E = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logp_EBT, mask_BT = stack.take(0, len(stack))
    at_once = document_sums(log_mixture(logp_EBT, prior_E, posterior).where(mask_BT, 0.0), stack.documents_BT)
    torch.testing.assert_close(stack.mixture_sums(prior_E, posterior)[TOKENS], at_once, rtol=1e-13, atol=0)


@pytest.mark.parametrize("garbage", [0.0, -1e9, math.nan, -math.inf])
def test_what_a_model_says_of_padding_plays_no_part(tmp_path: Path, garbage: float) -> None:
    rng = np.random.default_rng(2)
    shard = cut_into_blocks([5, 9, 7], 8)
    scores = -rng.exponential(3.0, size=(2, len(shard), 8))
    clean = np.where(shard >= 0, scores, -1.0)
    models, refs = commit_split(Ledger.open(f"{tmp_path}/a"), str(tmp_path), [shard], clean)
    expected = ScoreStack(Ledger.open(f"{tmp_path}/a"), models, refs)
    models, refs = commit_split(
        Ledger.open(f"{tmp_path}/b"), str(tmp_path), [shard], np.where(shard >= 0, scores, garbage)
    )
    found = ScoreStack(Ledger.open(f"{tmp_path}/b"), models, refs)
    assert found.sizes()[TOKENS].tolist() == [5, 9, 7]
    prior_E = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    for posterior in POSTERIORS:
        assert torch.equal(found.mixture_sums(prior_E, posterior), expected.mixture_sums(prior_E, posterior))
    assert torch.equal(found.sums(), expected.sums())
    assert torch.equal(found.take(0, len(found))[0], expected.take(0, len(expected))[0]), (
        "priors are fitted on these"
    )


# Sums, perplexity and intervals


def test_document_sums_and_tokens_are_those_of_a_loop() -> None:
    owners = torch.tensor([[0, 0, 1], [1, 1, 1], [3, -1, -1]])
    logp = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0], [-64.0, -128.0, -256.0]])
    assert document_sums(logp, owners).tolist() == [-3.0, -60.0, 0.0, -64.0]
    assert document_sums(torch.ones_like(owners), owners).tolist() == [2, 4, 0, 1]
    assert document_sums(logp[:0], owners[:0]).tolist() == []


def test_a_documents_last_token_is_its_end_wherever_blocks_and_shards_are_cut() -> None:
    owners = torch.tensor([[0, 0, 1], [1, 2, 3], [3, -1, -1], [4, 4, 4]])
    assert ends_of_documents(owners).int().tolist() == [[0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert ends_of_documents(owners[:0]).shape == (0, 3)


def test_perplexity_is_per_token_and_not_the_mean_over_documents() -> None:
    logp_SD = torch.tensor([[-2.0, -30.0], [-4.0, -60.0]], dtype=torch.float64)
    tokens_D = torch.tensor([2.0, 14.0], dtype=torch.float64)
    found = perplexity(logp_SD.sum(1), tokens_D.sum())
    np.testing.assert_allclose(found.numpy(), [math.exp(2), math.exp(4)])


def test_a_model_that_knows_nothing_of_bytes_spends_eight_bits_on_each() -> None:
    nats, sizes = torch.tensor(-7 * math.log(256), dtype=torch.float64), torch.tensor(7)
    assert float(bits_per_byte(nats, sizes)) == pytest.approx(8)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity_in_every_resample() -> None:
    tokens_D = torch.arange(1, 40, dtype=torch.float64)
    logp_SD = (-math.log(320) * tokens_D)[None]
    assert float(perplexity(logp_SD.sum(), tokens_D.sum())) == pytest.approx(320)
    np.testing.assert_allclose(resampled_perplexity(logp_SD, tokens_D, 50, 0).numpy(), 320, rtol=1e-12)


def test_all_systems_see_the_same_resamples_of_whole_documents() -> None:
    rng = np.random.default_rng(3)
    tokens_D = torch.from_numpy(rng.integers(1, 50, 30)).double()
    logp_D = -tokens_D * torch.from_numpy(rng.uniform(2, 5, 30))
    found = resampled_perplexity(torch.stack([logp_D, logp_D, 1.1 * logp_D]), tokens_D, 200, random_seed=7)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[2].log(), 1.1 * found[0].log())
    assert found[0].unique().numel() > 190
    assert torch.equal(
        found, resampled_perplexity(torch.stack([logp_D, logp_D, 1.1 * logp_D]), tokens_D, 200, 7)
    )
    assert not torch.equal(found[0], resampled_perplexity(logp_D[None], tokens_D, 200, random_seed=8)[0])


def test_resampling_in_parts_draws_what_resampling_at_once_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens_D = torch.arange(1, 41, dtype=torch.float64)
    logp_SD = -torch.rand(2, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * tokens_D
    at_once = resampled_perplexity(logp_SD, tokens_D, 101, random_seed=5)
    monkeypatch.setattr(of_perplexity, "RESAMPLED_AT_ONCE", 10 * 40)
    in_parts = resampled_perplexity(logp_SD, tokens_D, 101, random_seed=5)
    assert in_parts.shape == (2, 101)
    torch.testing.assert_close(in_parts, at_once)


def test_the_spread_of_resamples_is_that_of_the_mean_over_documents() -> None:
    # Documents of equal length: log-perplexity is a plain mean, whose standard error is known in closed form.
    rng = np.random.default_rng(6)
    loss_D = rng.normal(3.0, 0.5, size=400)
    found = resampled_perplexity(
        torch.from_numpy(-10 * loss_D)[None], torch.full((400,), 10.0).double(), 4000, 0
    )[0]
    assert float(found.log().std()) == pytest.approx(loss_D.std() / 20, rel=0.05)
    assert float(found.log().mean()) == pytest.approx(loss_D.mean(), abs=0.005)


def test_an_interval_holds_its_share_of_the_values_in_the_middle() -> None:
    values = torch.from_numpy(np.random.default_rng(7).permutation(10_001)).double()
    assert interval(values) == (pytest.approx(250), pytest.approx(9750))
    assert interval(values, coverage=0.5) == (pytest.approx(2500), pytest.approx(7500))


def test_paired_intervals_hold_the_true_difference_about_as_often_as_they_claim() -> None:
    # Two systems on 300 made-up texts of 120 documents. Documents differ far more from each other than the
    # systems do, so only a paired interval is both narrow and right.
    rng = np.random.default_rng(8)
    true_ratio, held, widths = math.exp(-0.05), 0, []
    for number in range(300):
        tokens = rng.integers(20, 200, size=120).astype(float)
        difficulty = rng.normal(4.0, 1.0, size=120)
        gain = rng.normal(0.05, 0.1, size=120)
        logp = torch.from_numpy(np.stack([-tokens * difficulty, -tokens * (difficulty - gain)]))
        resamples = resampled_perplexity(logp, torch.from_numpy(tokens), 400, random_seed=number)
        low, high = interval(resamples[1] / resamples[0] - 1)
        held += low <= true_ratio - 1 <= high
        widths.append(high - low)
    assert 0.90 <= held / 300 <= 0.985
    assert np.mean(widths) < 0.05
