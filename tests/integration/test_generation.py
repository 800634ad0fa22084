"""`btm generate`: a grown forest continues a prompt, weighed as its plan says."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.equations import learned_gate
from btm_cluster.ledger import Ledger, artifact_key
from btm_cluster.plan import Plan
from btm_cluster.terminal.output import printable
from tests.conftest import in_process, plan_fields


def test_a_grown_forest_continues_a_prompt_and_says_whom_it_trusts(
    texts: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = plan_fields(texts, tmp_path / "store") | {"merging": {"top_k": 2}}
    plan = Plan.model_validate(fields)
    forest = grow(plan, in_process(plan)).forest
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields))

    def btm(*arguments: str) -> int:
        call = ["generate", str(tmp_path / "plan.yaml"), "--in-process", "--json", *arguments]
        return run_command(lambda: app(call, standalone_mode=False))

    for arguments in ((), ("--for", "market")):
        assert btm("--prompt", "a b", "--max-new-tokens", "8", *arguments) == 0
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["tokens"] <= 8
        assert found["text"]
        assert set(found["expert_weights"]) <= set(forest.domains)
        assert sum(found["expert_weights"].values()) == pytest.approx(1)
    assert len(found["expert_weights"]) == 2, "top_k of the plan"
    monkeypatch.setattr(learned_gate, "LOOKS", 1)
    for merging in ({"posterior": "gate"}, {"posterior": "gate", "with_seed": True}, {"with_seed": True}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields | {"merging": merging}))
        for arguments in ((), ("--for", "market")):
            assert btm("--prompt", "a b", "--max-new-tokens", "8", *arguments) == 0
            found = json.loads(capsys.readouterr().out)
            assert set(found["expert_weights"]) == {
                *forest.domains,
                *(["the seed"] if "with_seed" in merging else []),
            }
            assert sum(found["expert_weights"].values()) == pytest.approx(1)
    assert btm("--prompt", "word " * 40) == 2
    assert "the prompt is too long" in capsys.readouterr().err
    assert btm("--for", "nowhere") == 2
    assert "harbour" in capsys.readouterr().err, "the texts that there are"


@pytest.fixture(scope="module")
def plan_path(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of a grown forest, whose block has 32 tokens."""
    folder = tmp_path_factory.mktemp("written")
    fields = plan_fields(texts, folder / "store")
    plan = Plan.model_validate(fields)
    grow(plan, in_process(plan))
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    return folder / "plan.yaml"


Generate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """`btm generate` in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        whole = ["generate", str(plan_path), "--in-process", *map(str, arguments)]
        return run_command(lambda: app(whole, standalone_mode=False)), *capsys.readouterr()

    return call


def test_standard_output_is_the_text_alone_though_a_fit_is_made_for_it(
    generate: Generate, plan_path: Path
) -> None:
    ledger = Ledger.open(str(plan_path.parent / "store"))
    for fit in ledger.list_artifacts("fit"):
        ledger.storage.delete(artifact_key(fit.ref))
    code, out, err = generate("--prompt", "a b", "--max-new-tokens", 3)
    assert code == 0
    assert "2/2 fits" in err
    assert out.startswith("a b")
    assert "fits" not in out


def test_prompts_of_a_file_are_written_on_each_by_random_numbers_of_its_own(
    generate: Generate, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa b\r\n\na b\nstone\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("a b", "a b", "stone"))
    )
    texts = [tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"]
    found, same = (
        json.loads(generate("--prompts", file, "--max-new-tokens", 6, "--json")[1]) for file in texts
    )
    assert found == same
    assert [one["prompt"] for one in found] == ["a b", "a b", "stone"]
    assert found[0]["text"] != found[1]["text"]
    alone = json.loads(generate("--prompt", "a b", "--max-new-tokens", 6, "--json")[1])
    assert alone["expert_weights"] == pytest.approx(found[0]["expert_weights"]), "but for rounding"
    assert alone | {"expert_weights": None} == found[0] | {"expert_weights": None}
    code, out, err = generate("--prompts", texts[0], "--max-new-tokens", 6)
    assert code == 0
    assert out == "".join(
        f"--- prompt {n} of 3\n{one['prompt']}{one['text']}\n" for n, one in enumerate(found, 1)
    )
    assert "prompt 3 of 3: 6 tokens, as many as asked for; weights: " in err


def test_a_full_block_a_stop_string_and_other_settings_are_told(generate: Generate) -> None:
    likeliest = json.loads(generate("--prompt", "a b", "--temperature", 0, "--json")[1])
    assert likeliest["prompt_tokens"] + likeliest["tokens"] == 32
    assert likeliest["finish"] == "block"
    assert "pieces" not in likeliest
    code, out, err = generate("--prompt", "a b", "--temperature", 0)
    assert (code, out) == (0, "a b" + likeliest["text"] + "\n")
    assert "the block is full; weights: " in err
    assert f"note: the block of 32 tokens is full: the prompt has {likeliest['prompt_tokens']}" in err
    assert json.loads(generate("--prompt", "a b", "--top-k", 1, "--random-seed", 5, "--json")[1]) == likeliest
    first, second = (json.loads(generate("--prompt", "a", "--random-seed", n, "--json")[1]) for n in (1, 2))
    assert first["text"] != second["text"]
    repeats, avoids = (
        json.loads(generate("--temperature", 0, "--repetition-penalty", p, "--json", "--show-experts")[1])
        for p in (1, 1e6)
    )
    assert len({piece["text"] for piece in avoids["pieces"]}) > len(
        {piece["text"] for piece in repeats["pieces"]}
    )
    stop = likeliest["text"][3:5]
    stopped = json.loads(
        generate("--prompt", "a b", "--temperature", 0, "--stop", "☃", "--stop", stop, "--json")[1]
    )
    assert stopped["finish"] == "stop"
    assert stopped["text"] == likeliest["text"][: likeliest["text"].index(stop)]


def test_each_token_is_shown_with_the_expert_of_its_largest_share(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--prompt", "a b", "--show-experts", "--max-new-tokens", 20)
    found = json.loads(generate(*asked, "--json")[1])
    assert "".join(piece["text"] for piece in found["pieces"]) == found["text"]
    assert len(found["pieces"]) == found["tokens"]
    experts = [piece["expert"] for piece in found["pieces"]]
    assert len(set(experts)) > 1, "or the rest shows nothing"
    assert all(1 / 3 <= piece["share"] <= 1 for piece in found["pieces"])

    _, marked, _ = generate(*asked)
    text, _, legend = marked.partition("\n\n")
    assert "\x1b" not in marked
    changes = [expert for before, expert in zip([None, *experts], experts, strict=False) if expert != before]
    assert re.findall(r"\[(\w+)\]", text) == changes
    assert re.sub(r"\[\w+\]", "", text) == "a b" + found["text"]
    counted = dict(re.findall(r"\[(\w+)\] has the largest share in (\d+) of 20 tokens", legend))
    assert counted == {expert: str(experts.count(expert)) for expert in set(experts)}

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    _, coloured, _ = generate(*asked)
    assert f"\x1b[36m■ {max(set(experts), key=experts.count)}\x1b[0m" in coloured
    shown = printable("a b" + found["text"])  # no control characters at a terminal
    assert shown in re.sub(r"\x1b\[[\d;]*m", "", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert printable(marked) in generate(*asked)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-new-tokens", "0"), "the number of new tokens is too small"),
        (("--temperature", "-1"), "temperature is out of range"),
        (("--temperature", "nan"), "temperature is out of range"),
        (("--top-p", "0"), "top-p is out of range"),
        (("--top-k", "0"), "top-k is too small"),
        (("--repetition-penalty", "0"), "repetition penalty is out of range"),
        (("--stop", ""), "a stop string is empty"),
        (("--stop", os.fsdecode(b"caf\xe9")), "a stop string is no UTF-8"),
        (("--prompts", "none.txt"), "the prompts in none.txt cannot be read"),
        (("--prompts", "."), "cannot be read"),
        (("--prompts", "empty.txt"), "empty.txt has no prompt"),
        (("--prompts", "latin.txt"), "latin.txt is no UTF-8"),
        (("--prompts", "bad.jsonl"), "bad.jsonl:2 is no prompt"),
        (("--prompts", "half.jsonl"), "half.jsonl:1 is no UTF-8"),
        (("--prompts", "empty.txt", "--prompt", "a"), "there are prompts twice"),
    ],
)
def test_a_call_that_cannot_be_met_is_refused_before_a_store_is_opened(
    arguments: tuple[str, ...],
    message: str,
    generate: Generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, data in {
        "empty.txt": b" \n\n",
        "latin.txt": b"caf\xe9",
        "bad.jsonl": b'{"prompt": "a"}\n{"text": "a"}\n',
        "half.jsonl": b'{"prompt": "\\ud83d"}',
    }.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)

    def opened(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("btm_cluster.session.open_ledger", opened)
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if " INFO " not in line]
    assert said[0].startswith("error: ")
    assert message in err


def test_a_forest_too_large_for_the_memory_is_refused_before_a_model_is_read(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btm_cluster.steps.shared_models.free_memory", lambda _: 10_000)
    monkeypatch.setattr("btm_cluster.steps.shared_models.open_model", None)
    code, out, err = generate("--prompt", "a")
    assert (code, out) == (2, "")
    assert "error: the models do not fit the free memory of this machine" in err
    assert "in float32" in err
    assert "merging.top_k" in err


def test_a_prompt_that_fills_a_block_is_named_before_a_model_is_loaded(
    generate: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n" + "word " * 40)
    monkeypatch.setattr("btm_cluster.steps.mixture.SharedModels", None)
    code, _, err = generate("--prompts", tmp_path / "prompts.txt")
    assert code == 2
    assert "prompt 2 of 2 is too long" in err
