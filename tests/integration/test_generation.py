"""A forest as one model: its predictions against mixtures written out by hand, and `btm generate`."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.equations import learned_gate
from btm_cluster.equations.gates import Gate, log_gated_mixture
from btm_cluster.equations.learned_gate import LearnedGate, features
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.posterior import Posterior
from btm_cluster.language_model.ensemble import Ensemble, Sampling
from btm_cluster.language_model.scoring import score_tokens
from btm_cluster.mixing import Mixing
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources
from tests.conftest import in_process, plan_fields

VOCABULARY, END = 24, 0


def random_gate() -> LearnedGate:
    """A gate that trusts three experts very differently, by whatever it sees."""
    generator = torch.Generator().manual_seed(3)
    one = torch.zeros(1, 1, 1)
    count, hidden = features(one, one, one[0] == 0).shape[-1], 4
    shapes = {
        "linear_F": (count,),
        "inner_FH": (count, hidden),
        "inner_H": (hidden,),
        "outer_H": (hidden,),
        "bias_E": (3,),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return LearnedGate(center_F=torch.zeros(count), scale_F=torch.ones(count), **drawn)


POSTERIORS = [
    Posterior("full"),
    Posterior("last-token"),
    Posterior("window", window_tokens=3),
    Posterior("calibrated", discount=0.9, weight=0.4),
]
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
LEARNED = random_gate()
TEXT = torch.randint(1, VOCABULARY, (12,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def experts() -> list[PreTrainedModel]:
    """Three models that disagree."""
    models: list[PreTrainedModel] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
        )
        models.append(model.eval())
    return models


@pytest.mark.parametrize("posterior", POSTERIORS, ids=str)
def test_every_next_token_has_the_probability_of_the_mixture_written_out(
    experts: list[PreTrainedModel], posterior: Posterior
) -> None:
    ensemble = Ensemble(experts, Mixing(PRIOR, posterior), END)
    with torch.inference_mode():
        ids = torch.tensor([[END, *TEXT]])
        p_ETV = torch.stack([torch.softmax(model(ids).logits[0].double(), dim=-1) for model in experts])
    for t in range(len(TEXT) + 1):
        seen = {"last-token": range(max(0, t - 1), t), "window": range(max(0, t - 3), t)}.get(posterior.kind, range(t))
        decay = posterior.discount if posterior.kind == "calibrated" else 1.0
        joint = [
            math.exp(
                float(PRIOR[j])
                + posterior.weight * sum(decay ** (t - 1 - u) * math.log(p_ETV[j, u, TEXT[u]]) for u in seen)
            )
            for j in range(3)
        ]
        expected_V = sum(joint[j] / sum(joint) * p_ETV[j, t] for j in range(3))
        torch.testing.assert_close(ensemble.log_probs().exp(), expected_V, rtol=1e-5, atol=1e-9)
        assert float(ensemble.log_probs().exp().sum()) == pytest.approx(1, abs=1e-6)
        ensemble.read(TEXT[t : t + 1])


@pytest.mark.parametrize("gate", [*(Mixing(PRIOR, posterior) for posterior in POSTERIORS), LEARNED])
def test_what_is_read_has_the_probability_that_scoring_gives_it_in_one_go_or_in_pieces(
    experts: list[PreTrainedModel], gate: Gate
) -> None:
    how = Resources(
        workers=1, gpus_per_worker=0, cpus_per_worker=1, micro_batch_blocks=1, precision="float32", compile=False
    )
    block = torch.tensor([TEXT])
    scored = [score_tokens(model, block, END, how) for model in experts]
    logp_EBT, entropy_EBT = (torch.stack(values).double() for values in zip(*scored, strict=True))
    expected_T = log_gated_mixture(gate, logp_EBT, entropy_EBT)[0]
    if isinstance(gate, Mixing):
        torch.testing.assert_close(log_mixture(logp_EBT, PRIOR, gate.posterior)[0], expected_T)
    ensemble, at_once = (Ensemble(experts, gate, END) for _ in range(2))
    found = []
    for token in TEXT:
        found.append(float(ensemble.log_probs()[token]))
        ensemble.read([token])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected_T, rtol=1e-5, atol=1e-6)
    at_once.read(TEXT[:7])
    at_once.read(TEXT[7:])
    torch.testing.assert_close(at_once.log_probs(), ensemble.log_probs(), rtol=1e-5, atol=1e-6)


def test_a_block_is_written_to_its_end(experts: list[PreTrainedModel]) -> None:
    """Its last token was read too, at a position that GPT-2 does not have: an IndexError after all was written."""
    for read in (0, 15):
        ensemble = Ensemble(experts, Mixing(PRIOR, POSTERIORS[0]), END, (TEXT * 2)[:read])
        assert len(list(ensemble.write(16 - read, -1, VOCABULARY, Sampling()))) == 16 - read


def test_tokens_are_drawn_as_asked_and_end_of_text_ends(experts: list[PreTrainedModel]) -> None:
    def written(sampling: Sampling, end: int = -1) -> list[int]:
        return list(Ensemble(experts, mixing, END).write(10, end, VOCABULARY, sampling))

    mixing = Mixing(PRIOR, POSTERIORS[3])
    ensemble = Ensemble(experts, mixing, END)
    likeliest = []
    for _ in range(10):
        likeliest.append(int(ensemble.log_probs().argmax()))
        ensemble.read(likeliest[-1:])
    assert written(Sampling(temperature=0)) == likeliest
    assert written(Sampling(top_p=1e-6)) == likeliest
    drawn = written(Sampling(random_seed=1))
    assert drawn == written(Sampling(random_seed=1)) != written(Sampling(random_seed=2))
    assert written(Sampling(random_seed=1), end=drawn[4]) == drawn[: drawn.index(drawn[4])]


def test_a_grown_forest_continues_a_prompt_and_says_whom_it_trusts(
    texts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = plan_fields(texts, tmp_path / "store") | {"merging": {"top_k": 2}}
    plan = Plan.model_validate(fields)
    forest = grow(plan, in_process(plan)).forest
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields))

    def btm(*arguments: str) -> int:
        call = ["generate", str(tmp_path / "plan.yaml"), "--in-process", "--json", *arguments]
        return run_command(lambda: app(call, standalone_mode=False))

    for arguments in ((), ("--for", "market")):
        assert btm("--prompt", "a b", "--tokens", "8", *arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["tokens"] <= 8
        assert found["text"]
        assert set(found["trust"]) <= set(forest.domains)
        assert sum(found["trust"].values()) == pytest.approx(1)
    assert len(found["trust"]) == 2, "top_k of the plan"
    monkeypatch.setattr(learned_gate, "LOOKS", 1)
    for merging in ({"posterior": "gate"}, {"posterior": "gate", "with_seed": True}, {"with_seed": True}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields | {"merging": merging}))
        for arguments in ((), ("--for", "market")):
            assert btm("--prompt", "a b", "--tokens", "8", *arguments) == 0
            found = json.loads(capsys.readouterr().out)
            assert set(found["trust"]) == {*forest.domains, *(["the seed"] if "with_seed" in merging else [])}
            assert sum(found["trust"].values()) == pytest.approx(1)
    assert btm("--prompt", "word " * 40) == 2
    assert "the prompt is too long" in capsys.readouterr().err
    assert btm("--for", "nowhere") == 2
    assert "harbour" in capsys.readouterr().err, "the texts that there are"
    for wrong in (("--tokens", "0"), ("--temperature", "-1"), ("--top-p", "0")):
        assert btm(*wrong) == 2
        assert "error: " in capsys.readouterr().err
