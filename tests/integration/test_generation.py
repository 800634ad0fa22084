"""`btm generate`: a grown forest continues a prompt, weighed as its plan says."""

import json
from pathlib import Path

import pytest
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.equations import learned_gate
from btm_cluster.plan import Plan
from tests.conftest import in_process, plan_fields


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
