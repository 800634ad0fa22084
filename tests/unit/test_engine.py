"""The engine against mixtures written out by hand, scores, and texts of which every one is counted."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.equations.gate_features import features
from btm_cluster.equations.gates import DISCOUNTS, Discounts, FixedShare, Gate, log_gated_mixture
from btm_cluster.equations.learned_gate import LearnedGate
from btm_cluster.equations.posterior import Posterior, keep_top
from btm_cluster.errors import UserError
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings, Way
from btm_cluster.language_model.ensemble_scoring import passes
from btm_cluster.language_model.model import in_precision
from btm_cluster.language_model.prompts import Prompt, Written, pieces
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.language_model.scoring import said_of, score_blocks, score_tokens
from btm_cluster.mixing.fitting import Mixing
from btm_cluster.requests import Resources

VOCABULARY, BLOCK, FIRST = 24, 16, 0
HOW = Resources(
    workers=1, gpus_per_worker=0, cpus_per_worker=1, micro_batch_blocks=4, precision="float32", compile=False
)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
TEXT = torch.randint(1, VOCABULARY, (BLOCK,), generator=torch.Generator().manual_seed(5)).tolist()
POSTERIORS = [
    Posterior("full"),
    Posterior("last-token"),
    Posterior("window", window_tokens=3),
    Posterior("calibrated", discount=0.9, weight=0.4),
]
FULL = Mixing(PRIOR, POSTERIORS[0])
GREEDY = Sampling(temperature=0)
WAYS: tuple[Way, ...] = ("rows", "readers", "anew")


def random_gate() -> LearnedGate:
    """A gate that trusts three experts very differently, by whatever it sees."""
    generator = torch.Generator().manual_seed(3)
    one = torch.zeros(1, 1, 1)
    count, hidden = features(one, one, one[0] == 0).shape[-1], 4
    shapes = {"linear_F": (count,), "inner_FH": (count, hidden), "inner_H": (hidden,), "outer_H": (hidden,)}
    drawn = {
        name: torch.randn(shape, generator=generator) for name, shape in (shapes | {"bias_E": (3,)}).items()
    }
    return LearnedGate(center_F=torch.zeros(count), scale_F=torch.ones(count), **drawn)


GATES: list[Gate] = [
    *(Mixing(PRIOR, posterior) for posterior in POSTERIORS),
    FixedShare(PRIOR, 0.1, 2.0),
    Discounts(PRIOR, DISCOUNTS, torch.linspace(-0.1, 0.2, 7, dtype=torch.float64)),
    random_gate(),
]


def made_up_model(seed: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_positions": BLOCK, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **ends))
    return model.eval()


@pytest.fixture(scope="module")
def experts() -> list[PreTrainedModel]:
    """Three models that disagree."""
    return [made_up_model(seed) for seed in range(3)]


def spell(_: Sequence[int], ids: Sequence[int]) -> str:
    """A tokenizer of letters."""
    return "".join(chr(ord("a") + token) for token in ids)


def opened(
    experts: Sequence[PreTrainedModel], gate: Gate = FULL, rows: int = 4, **more: Any
) -> EnsembleEngine:
    asked = {"way": "rows", "first_token": FIRST, "vocabulary": VOCABULARY, "block_tokens": BLOCK} | more
    return EnsembleEngine(experts, gate, EngineSettings(rows=rows, **asked), spell)


def probabilities(experts: Sequence[PreTrainedModel], text: Sequence[int]) -> torch.Tensor:
    """p_j of every next token after each beginning of a text: float64 [E, T + 1, V]."""
    with torch.inference_mode():
        ids = torch.tensor([[FIRST, *text]])
        return torch.stack([torch.softmax(model(ids).logits[0].double(), dim=-1) for model in experts])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=str)
def test_every_next_token_has_the_probability_of_the_mixture_written_out(
    experts: list[PreTrainedModel], posterior: Posterior, way: Way
) -> None:
    engine = opened(experts, Mixing(PRIOR, posterior), way=way)
    p_ETV = probabilities(experts, TEXT[:-1])
    other, row = engine.admit([Prompt(TEXT[3:9], BLOCK), Prompt([], BLOCK)])
    engine.release(other)
    for t in range(BLOCK):
        seen = {"last-token": range(max(0, t - 1), t), "window": range(max(0, t - 3), t)}.get(
            posterior.kind, range(t)
        )
        decay = posterior.discount if posterior.kind == "calibrated" else 1.0
        joint = [
            math.exp(
                float(PRIOR[j])
                + posterior.weight * sum(decay ** (t - 1 - u) * math.log(p_ETV[j, u, TEXT[u]]) for u in seen)
            )
            for j in range(3)
        ]
        expected_V = sum(joint[j] / sum(joint) * p_ETV[j, t] for j in range(3))
        found_V = engine.log_probs(row).double().exp()
        torch.testing.assert_close(found_V, expected_V, rtol=1e-5, atol=1e-8)
        assert float(found_V.sum()) == pytest.approx(1, abs=1e-5)
        drawn = engine.step({row: TEXT[t]})[row]
        assert drawn.logp == pytest.approx(math.log(expected_V[TEXT[t]]), abs=1e-5)
        assert drawn.weights_E == pytest.approx([joint[j] / sum(joint) for j in range(3)], abs=1e-5)
        carried = [
            joint[j] / sum(joint) * float(p_ETV[j, t, TEXT[t]] / expected_V[TEXT[t]]) for j in range(3)
        ]
        assert drawn.shares_E == pytest.approx(carried, abs=1e-5)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_a_text_has_the_probability_that_its_stored_scores_give_it(
    experts: list[PreTrainedModel], gate: Gate, tmp_path: Path
) -> None:
    """Written token by token after prompts of several lengths, or scored in padded batches."""
    blocks = np.array([TEXT, TEXT[::-1], TEXT[5:] + TEXT[:5]])
    np.save(tmp_path / "tokens.npy", blocks)
    stored = []
    for j, model in enumerate(experts):
        (tmp_path / str(j)).mkdir()
        files = score_blocks(model, Blocks([tmp_path / "tokens.npy"]), FIRST, HOW, tmp_path / str(j))
        stored.append(
            [torch.from_numpy(np.load(files[name])).double() for name in ("logp.npy", "entropy.npy")]
        )
    logp_EBT, entropy_EBT = (torch.stack(values) for values in zip(*stored, strict=True))
    expected_BT = log_gated_mixture(gate, logp_EBT, entropy_EBT)

    engine = opened(experts, gate)
    lengths = (0, 4, 11)
    rows = engine.admit([Prompt(blocks[b, :n].tolist(), BLOCK) for b, n in enumerate(lengths)])
    found: dict[int, list[float]] = {row: [] for row in rows}
    while forced := {row: int(blocks[b, lengths[b] + len(found[row])]) for b, row in enumerate(rows) if
                     lengths[b] + len(found[row]) < BLOCK}:  # fmt: skip
        for row, drawn in engine.step(forced).items():
            found[row].append(drawn.logp)
    for b, row in enumerate(rows):
        torch.testing.assert_close(
            torch.tensor(found[row]).double(), expected_BT[b, lengths[b] :], rtol=0, atol=1e-5
        )

    texts = [block[:n].tolist() for block in blocks for n in (BLOCK, 3, 9, 0)]
    for at_once in (1, 5, len(texts)):
        scored = [one for i in range(0, len(texts), at_once) for one in engine.score(texts[i : i + at_once])]
        for i, one in enumerate(scored):
            count = len(texts[i])
            torch.testing.assert_close(one.logp_T, expected_BT[i // 4, :count], rtol=0, atol=1e-5)
            torch.testing.assert_close(one.logp_ET, logp_EBT[:, i // 4, :count], rtol=0, atol=1e-5)
            weights_ET = torch.cat([one.log_weights_ET, one.log_weights_after_E[:, None]], dim=1)
            if count < BLOCK:
                expected_ET = gate.log_weights(logp_EBT, entropy_EBT)[:, i // 4, : count + 1]
                torch.testing.assert_close(weights_ET, expected_ET, rtol=0, atol=1e-4)
            torch.testing.assert_close(weights_ET.exp().sum(0), torch.ones(count + 1).double())


def test_the_likeliest_tokens_are_told_beside_what_was_written_and_what_was_scored(
    experts: list[PreTrainedModel],
) -> None:
    engine = opened(experts)
    row, _ = engine.admit([Prompt(TEXT[:3], BLOCK, alternatives=4), Prompt(TEXT[:2], BLOCK)])
    expected = []
    for token in TEXT[3:8]:
        best = engine.log_probs(row).topk(4)
        expected.append(best.indices.tolist())
        told = engine.step({row: token})[row].alternatives
        assert [other for other, _ in told] == expected[-1]
        assert [logp for _, logp in told] == pytest.approx(best.values.tolist())
    scored = engine.score([TEXT[:8], TEXT[:5]], alternatives=4)
    assert scored[0].alternatives_TK[3:].tolist() == expected
    assert [len(one.alternatives_TK) for one in scored] == [8, 5]


def test_rows_and_readers_write_the_same(experts: list[PreTrainedModel]) -> None:
    prompts = [Prompt(TEXT[: n % 9], 12, Sampling(random_seed=n, top_p=0.9)) for n in range(9)]
    written = [opened(experts, way=way, rows=4).generate(prompts) for way in WAYS]
    assert tokens_of(written[0]) == tokens_of(written[1]) == tokens_of(written[2])


def tokens_of(written: Sequence[Written]) -> list[list[int]]:
    return [one.tokens for one in written]


def test_what_a_row_writes_depends_on_nothing_beside_it(experts: list[PreTrainedModel]) -> None:
    """Alone, in a full batch, in another order, or admitted after others have
    begun; with filters beside it or not."""
    asked = [
        Sampling(random_seed=7),
        Sampling(random_seed=8, top_k=3),
        Sampling(random_seed=7, temperature=1.5),
        Sampling(random_seed=9, repetition_penalty=1.5, top_p=0.8),
        GREEDY,
    ]
    prompts = [Prompt(TEXT[: 2 * i], 9, sampling) for i, sampling in enumerate(asked)]
    alone = [opened(experts, rows=1).generate([prompt])[0].tokens for prompt in prompts]
    assert tokens_of(opened(experts, rows=5).generate(prompts)) == alone
    assert tokens_of(opened(experts, rows=2).generate(prompts[::-1]))[::-1] == alone
    engine = opened(experts, rows=8)
    rows = []
    for prompt in prompts:
        rows += engine.admit([prompt])
        engine.step()
    for _ in range(9):
        engine.step()
    assert [engine.release(row).tokens for row in rows] == alone


def test_tokens_are_drawn_as_asked(experts: list[PreTrainedModel]) -> None:
    engine = opened(experts, rows=1)

    def written(sampling: Sampling) -> list[int]:
        return engine.generate([Prompt([], 10, sampling)])[0].tokens

    row = engine.admit([Prompt([], BLOCK)])[0]
    likeliest = []
    for _ in range(10):
        likeliest.append(int(engine.log_probs(row).argmax()))
        engine.step({row: likeliest[-1]})
    engine.release(row)
    assert written(GREEDY) == likeliest
    assert written(Sampling(top_p=1e-6)) == written(Sampling(top_k=1)) == likeliest
    assert (
        written(Sampling(random_seed=1))
        == written(Sampling(random_seed=1))
        != written(Sampling(random_seed=2))
    )
    never_twice = written(Sampling(temperature=0, repetition_penalty=1e6))
    assert len(set(never_twice)) == 10
    assert written(Sampling(temperature=1e-4)) == likeliest


def test_samples_of_one_prompt_differ_and_are_read_once(experts: list[PreTrainedModel]) -> None:
    prompt = Prompt(TEXT[:4], 8, Sampling(random_seed=3))
    engine = opened(experts, rows=6)
    written = tokens_of(engine.generate(prompt.samples(6)))
    assert len({tuple(tokens) for tokens in written}) == 6
    assert written[4] == opened(experts, rows=1).generate([replace(prompt, sample=4)])[0].tokens
    assert written[0] == opened(experts, rows=1).generate([prompt])[0].tokens


def test_a_text_ends_where_its_block_is_full_or_enough_was_written_or_end_of_text_is_drawn(
    experts: list[PreTrainedModel],
) -> None:
    """The last token of a block has a place where no model reads: GPT-2 has no position for it."""
    engine = opened(experts)
    for read in (0, BLOCK - 1):
        written = engine.generate([Prompt(TEXT[:read], 100)])[0]
        assert (len(written.tokens), written.finish) == (BLOCK - read, "block")
    written = engine.generate([Prompt([], 5, Sampling(random_seed=1))])[0]
    assert (len(written.tokens), written.finish) == (5, "tokens")
    ended = opened(experts, end_of_text=written.tokens[3]).generate([Prompt([], 5, Sampling(random_seed=1))])[
        0
    ]
    assert ended.tokens == written.tokens[: written.tokens.index(written.tokens[3])]
    assert ended.finish == "end of text"
    assert len(ended.drawn) == len(ended.tokens)


def test_only_tokens_of_the_tokenizer_are_drawn(experts: list[PreTrainedModel]) -> None:
    written = opened(experts, vocabulary=3, rows=8).generate(
        [Prompt(TEXT[:2], 10).samples(8)[i] for i in range(8)]
    )
    assert {token for one in written for token in one.tokens} == {0, 1, 2}


def test_a_stop_string_ends_a_text_before_it_even_across_tokens(experts: list[PreTrainedModel]) -> None:
    engine = opened(experts)
    whole = engine.generate([Prompt([], 12, Sampling(random_seed=2))])[0]
    assert whole.text == spell([], whole.tokens)
    stop = whole.text[5:8]
    written, other = engine.generate(
        [Prompt([], 12, Sampling(random_seed=2), stop=("?", stop)), Prompt([], 12)]
    )
    assert (written.text, written.finish) == (whole.text[: whole.text.index(stop)], "stop")
    assert written.tokens == whole.tokens[: whole.text.index(stop) + 3]
    assert other.finish == "tokens"
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        EnsembleEngine(experts, FULL, engine.settings).admit([Prompt([], 3, stop=("a",))])


def test_the_pieces_of_tokens_make_the_text_and_a_character_stands_at_its_last_token() -> None:
    data = "a é 🙂 ab\xff".encode() + b"\xff\xf0\x9f"

    def decode(before: Sequence[int], ids: Sequence[int]) -> str:
        first, whole = (bytes(part).decode(errors="replace") for part in (before, [*before, *ids]))
        return whole[len(first) :]

    found = pieces(list(b"of "), list(data), decode)
    assert len(found) == len(data)
    assert "".join(found) == data.decode(errors="replace")
    assert found[:10] == ["a", " ", "", "é", " ", "", "", "", "🙂", " "]
    assert pieces([], [], decode) == []


def test_only_the_experts_with_most_weight_after_the_prompt_write(experts: list[PreTrainedModel]) -> None:
    prompt = TEXT[:6]
    engine = opened(experts)
    two, every = engine.admit([Prompt(prompt, 8, top_k_experts=2), Prompt(prompt, 8)])
    kept = torch.tensor(engine.step()[every].weights_E).argsort(descending=True)[:2]
    engine.release(every)
    for _ in range(6):
        weights_E = torch.tensor(engine.step()[two].weights_E)
        assert set(weights_E.nonzero()[:, 0].tolist()) <= set(kept.tolist())
        assert float(weights_E.sum()) == pytest.approx(1)


def test_what_two_experts_write_is_the_mixture_of_those_two_alone(experts: list[PreTrainedModel]) -> None:
    """As if the others had never been there, whichever of the experts run."""
    prompt = TEXT[:6]
    logp_ET = (
        probabilities(experts, prompt)[:, :-1]
        .gather(2, torch.tensor(prompt).expand(3, -1)[..., None])[..., 0]
        .log()
    )
    best = (PRIOR + logp_ET.sum(1)).argsort(descending=True)[:2].sort().values
    pair = [experts[j] for j in best.tolist()]
    asked = Prompt(prompt, 8, Sampling(random_seed=4), top_k_experts=2)
    found = opened(experts).generate([asked, replace(asked, top_k_experts=None)])[0]
    alone = opened(experts).generate([asked])[0]
    expected = opened(pair, Mixing(torch.log_softmax(PRIOR[best], 0), POSTERIORS[0])).generate([asked])[0]
    assert found.tokens == alone.tokens == expected.tokens
    for one in (found, alone):
        assert [d.logp for d in one.drawn] == pytest.approx([d.logp for d in expected.drawn], abs=1e-5)


def test_a_learned_gate_still_sees_the_experts_that_do_not_write(experts: list[PreTrainedModel]) -> None:
    gate = random_gate()
    engine = opened(experts, gate)
    one, every = engine.admit([Prompt(TEXT[:5], 9, top_k_experts=2), Prompt(TEXT[:5], 9)])
    kept = None
    for token in TEXT[5:12]:
        drawn = engine.step({one: token, every: token})
        two_E, all_E = (torch.tensor(drawn[row].weights_E) for row in (one, every))
        kept = all_E.argsort(descending=True)[:2] if kept is None else kept
        expected_E = torch.zeros(3)
        expected_E[kept] = all_E[kept] / all_E[kept].sum()
        torch.testing.assert_close(two_E, expected_E, rtol=1e-4, atol=1e-5)


def test_each_prompt_may_bring_a_prior_and_a_posterior_of_its_own(experts: list[PreTrainedModel]) -> None:
    gates = [FULL, Mixing(PRIOR.flip(0), POSTERIORS[3]), Mixing(keep_top(PRIOR, 1), POSTERIORS[0])]
    prompts = [Prompt(TEXT[:3], 8, gate=gate) for gate in gates]
    together = opened(experts).generate(prompts)
    for gate, one in zip(gates, together, strict=True):
        expected = opened(experts, gate).generate([Prompt(TEXT[:3], 8)])[0]
        assert one.tokens == expected.tokens
        assert one.drawn[-1].weights_E == pytest.approx(expected.drawn[-1].weights_E, abs=1e-6)
    assert set(together[2].mean_weights(3)) == {0.0, 1.0}
    with pytest.raises(UserError, match="gate is of another form"):
        opened(experts).admit([Prompt([], 3, gate=random_gate())])
    with pytest.raises(UserError, match="does not fit the engine's"):
        opened(experts).generate([Prompt([], 3), Prompt([], 3, gate=GATES[5])])


TINY = 4
"""Tokens of a vocabulary of which every text of three can be counted."""


def test_under_the_full_posterior_one_drawn_expert_writes_every_text_as_often_as_all_together() -> None:
    """Every continuation by three tokens, as a product of mixtures and as a mixture of products."""
    experts = [made_up_model(seed, TINY) for seed in range(3)]
    engine = opened(experts, vocabulary=TINY)
    prompt = [1, 3, 2]
    texts = [[*prompt, *rest] for rest in itertools.product(range(TINY), repeat=3)]
    together = torch.tensor([float(one.logp_T[3:].sum()) for one in engine.score(texts)]).exp()
    weights_E = engine.score([prompt])[0].log_weights_after_E.exp()
    apart = torch.zeros(len(texts)).double()
    for j, model in enumerate(experts):
        for i, text in enumerate(texts):
            p_TV = probabilities([model], text)[0]
            apart[i] += weights_E[j] * math.prod(float(p_TV[t, text[t]]) for t in range(3, 6))
    torch.testing.assert_close(together.double(), apart, rtol=1e-5, atol=1e-8)
    assert float(apart.sum()) == pytest.approx(1)

    count = 3000
    drawn = Counter[tuple[int, ...]]()
    chosen = Counter[int]()
    crowd = opened(experts, vocabulary=TINY, rows=500)
    for one in crowd.generate(Prompt(prompt, 3, draws_one_expert=True).samples(count)):
        assert {tuple(step.weights_E) for step in one.drawn} <= {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
        assert len({tuple(step.weights_E) for step in one.drawn}) == 1, "the same expert all the way"
        drawn[tuple(one.tokens)] += 1
        chosen[one.drawn[0].weights_E.index(1)] += 1
    expected = dict(zip((tuple(text[3:]) for text in texts), (apart * count).tolist(), strict=True))
    squares = sum((drawn[text] - often) ** 2 / often for text, often in expected.items())
    degrees = len(texts) - 1
    assert squares < degrees + 4 * math.sqrt(2 * degrees), "four standard deviations of chi-square"
    for j in range(3):
        assert chosen[j] == pytest.approx(float(weights_E[j]) * count, abs=4 * math.sqrt(count / 4))


@pytest.mark.parametrize(
    ("gate", "sampling"),
    [
        (GATES[3], Sampling()),
        (GATES[4], Sampling()),
        (FULL, GREEDY),
        (FULL, Sampling(top_p=0.9)),
        (FULL, Sampling(top_k=5)),
    ],
)
def test_one_expert_alone_is_refused_where_it_would_write_other_texts(
    experts: list[PreTrainedModel], gate: Gate, sampling: Sampling
) -> None:
    with pytest.raises(UserError, match="one expert alone would write other texts"):
        opened(experts, gate).admit([Prompt([], 3, sampling, draws_one_expert=True)])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(TEXT, 3), "the prompt is too long"),
        (Prompt([], 0), "no token is asked for"),
        (Prompt([VOCABULARY], 3), "an unknown token id"),
        (Prompt([-1], 3), "an unknown token id"),
        (Prompt([], 3, Sampling(temperature=-1)), "temperature is out of range"),
        (Prompt([], 3, top_k_experts=0), "too few experts"),
        (Prompt([], 3, alternatives=21), "number of alternatives"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_admitted(
    experts: list[PreTrainedModel], prompt: Prompt, message: str
) -> None:
    engine = opened(experts)
    with pytest.raises(UserError, match=message) as caught:
        engine.admit([Prompt([], 3), prompt])
    assert caught.value.expected
    assert engine.free_rows == 4
    assert engine.step() == {}
    with pytest.raises(UserError, match="too long"):
        engine.score([[*TEXT, 1]])


@pytest.mark.parametrize(
    ("lengths", "at_once", "most_padding", "expected"),
    [
        ([], 8, 8, []),
        ([3, 9, 5], 100, 100, [[1, 2, 0]]),
        ([3, 9, 5], 100, 9, [[1, 2], [0]]),
        ([4, 4, 4, 4, 4], 8, 0, [[0, 1], [2, 3], [4]]),
        ([2, 20, 20], 8, 100, [[1], [2], [0]]),
        ([1, 2, 3, 4], 100, 0, [[3], [2], [1], [0]]),
        ([6, 5, 4, 3, 2], 100, 3, [[0, 1, 2], [3, 4]]),
    ],
)
def test_texts_of_like_lengths_are_read_together(
    lengths: list[int], at_once: int, most_padding: int, expected: list[list[int]]
) -> None:
    assert passes(lengths, at_once, most_padding) == expected


class AsksTheHost(TorchDispatchMode):
    """Refuses operations that wait for the device, or whose shapes depend on
    values: none can be captured in a graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select")), (
            func
        )
        return func(*args, **(kwargs or {}))


def test_experts_read_texts_one_after_the_other_without_waiting_for_the_device(
    experts: list[PreTrainedModel],
) -> None:
    with torch.inference_mode(), AsksTheHost():
        for model in experts:
            said_of(model(torch.tensor([TEXT[:6], TEXT[6:12]])).logits.flatten(0, 1), torch.tensor(TEXT[:12]))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_a_step_asks_the_host_nothing_so_that_it_can_be_captured(
    experts: list[PreTrainedModel], gate: Gate
) -> None:
    engine = opened(experts, gate)
    engine.admit([Prompt(TEXT[:3], 9, Sampling(top_p=0.9), alternatives=2), Prompt([], 9)])
    with torch.inference_mode(), AsksTheHost():
        engine._step._run(2, filters=True, alternatives=True)
        engine._decoder._read_on(1, 2, BLOCK)  # type: ignore[attr-defined]


LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}


def test_in_bfloat16_weights_take_half_the_room_and_positions_stay_sharp() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **LLAMA)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    gate = Mixing(PRIOR[:2], POSTERIORS[0])
    sharp = opened(models, gate)
    text = TEXT[:12]
    expected_T, full = sharp.score([text])[0].logp_T, sharp.memory()
    rough = opened(models, gate, precision="bfloat16")
    assert {name: 2 * value for name, value in rough.memory().items()} == full
    assert full["rows"] == 4 * 2 * 2 * 2 * BLOCK * 2 * 8 * 4, (
        "rows, experts, layers, keys and values, places, heads, …"
    )
    assert {p.dtype for model in models for p in model.parameters()} == {torch.bfloat16}
    assert models[0].model.rotary_emb.inv_freq.dtype == torch.float32
    row = rough.admit([Prompt(text[:4], BLOCK)])[0]
    found = [rough.step({row: token})[row].logp for token in text[4:]]
    torch.testing.assert_close(torch.tensor(found).double(), expected_T[4:], rtol=0, atol=0.05)
    torch.testing.assert_close(rough.score([text])[0].logp_T, expected_T, rtol=0, atol=0.05)


def test_a_model_is_asked_for_once_the_one_before_is_in_its_place(experts: list[PreTrainedModel]) -> None:
    copies = [copy.deepcopy(expert) for expert in experts]

    def one_by_one() -> Iterator[PreTrainedModel]:
        for number, expert in enumerate(copies):
            assert all(p.dtype == torch.bfloat16 for before in copies[:number] for p in before.parameters())
            assert not torch.is_inference_mode_enabled(), "who shares it may train on"
            yield expert

    engine = EnsembleEngine(
        one_by_one(), FULL, EngineSettings(FIRST, VOCABULARY, BLOCK, precision="bfloat16")
    )
    assert engine.memory()["weights"] == sum(p.nbytes for expert in experts for p in expert.parameters()) / 2


def test_tensors_that_an_architecture_wants_sharp_stay_in_float32() -> None:
    model = made_up_model(0)
    model._keep_in_fp32_modules_strict = {"ln_f"}
    in_precision(model, torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    }


def test_experts_with_a_recurrent_state_are_mixed_as_their_scores_say() -> None:
    """Of Mamba, several tokens after a cache has begun are computed from an empty state by transformers."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, initializer_range=0.5, **shape)
        models.append(AutoModelForCausalLM.from_config(config).eval())
    gate = Mixing(PRIOR[:2], POSTERIORS[0])
    scored = [score_tokens(model, torch.tensor([TEXT]), FIRST, HOW) for model in models]
    logp_EBT, entropy_EBT = (torch.stack(values).double() for values in zip(*scored, strict=True))
    expected_T = log_gated_mixture(gate, logp_EBT, entropy_EBT)[0]
    engine = opened(models, gate, way=None)
    assert engine.way == "readers"
    rows = engine.admit([Prompt(TEXT[:9], BLOCK), Prompt(TEXT[:2], BLOCK)])
    found: dict[int, list[float]] = {row: [] for row in rows}
    for n in range(7):
        for row, drawn in engine.step({rows[0]: TEXT[9 + n], rows[1]: TEXT[2 + n]}).items():
            found[row].append(drawn.logp)
    for row, first in zip(rows, (9, 2), strict=True):
        torch.testing.assert_close(
            torch.tensor(found[row]).double(), expected_T[first : first + 7], rtol=0, atol=1e-5
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_captured_steps_write_what_steps_that_are_not_captured_write(gate: Gate) -> None:
    asked = [Sampling(random_seed=1), Sampling(random_seed=2, top_p=0.9), GREEDY]
    prompts = [Prompt(TEXT[: n + 2], 9, sampling) for n, sampling in enumerate(asked)]
    written = []
    for captures in (False, True):
        engine = opened([made_up_model(seed) for seed in range(3)], gate, device="cuda", captures=captures)
        for _ in range(3):  # as it is, captured, and replayed
            written.append(tokens_of(engine.generate(prompts)))
        assert engine.captures == captures
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
def test_an_expert_that_is_chosen_writes_what_it_writes_without_the_others(
    experts: list[PreTrainedModel], gate: Gate
) -> None:
    settings = EngineSettings(FIRST, VOCABULARY, BLOCK, rows=2)
    asked = Prompt(TEXT[:3], 8, Sampling(random_seed=4))
    (alone,) = EnsembleEngine(
        [experts[1]], Mixing(torch.zeros(1).double(), POSTERIORS[0]), settings
    ).generate([asked])
    (chosen,) = EnsembleEngine(experts, gate, settings).generate([replace(asked, experts=(1,))])
    assert chosen.tokens == alone.tokens
    assert [one.logp for one in chosen.drawn] == pytest.approx([one.logp for one in alone.drawn], abs=1e-5)
    assert chosen.mean_weights(3) == pytest.approx([0, 1, 0])
