"""The benchmarks' results: the README says what results.json has, and a row says how good it is."""

import argparse
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pydantic
import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts import what lies beside them
from contenders import anonymous_bytes
from results import README, Result, command_of, page, parse, record, stored

SECONDS = Result.model_validate(
    {
        "name": "averaging",
        "what": "two models",
        "machine": "two cores",
        "measured": "2026-11-30",
        "unit": "s",
        "better": "lower",
        "ours": 2.0,
        "theirs": 5.0,
        "peer": "another program 1.0",
        "goal": 3.0,
        "limit": 0.5,
        "limit_is": "reading",
        "beside": {"peak memory": "3 MiB, theirs 5 MiB"},
        "command": "python benchmarks/averaging.py",
    }
)


def test_the_readme_is_the_one_that_is_made_from_the_stored_results() -> None:
    assert README.read_text(encoding="utf-8") == page(stored())


def test_a_ratio_above_one_is_better_whatever_the_unit() -> None:
    rate = SECONDS.model_copy(update={"unit": "tokens/s", "better": "higher", "ours": 5.0, "theirs": 2.0})
    assert (SECONDS.ratio, SECONDS.share_of_limit, SECONDS.is_good_enough) == (2.5, 0.25, False)
    assert (rate.ratio, rate.share_of_limit, rate.is_good_enough) == (2.5, 10.0, False)


def test_a_goal_without_a_peer_is_the_worst_value_that_is_good_enough() -> None:
    alone = SECONDS.model_copy(update={"theirs": None, "peer": None})
    assert (alone.ratio, alone.is_good_enough) == (None, True)
    assert alone.model_copy(update={"better": "higher"}).is_good_enough is False


def test_a_result_replaces_the_last_one_of_its_name(tmp_path: Path) -> None:
    rows, readme = tmp_path / "results.json", tmp_path / "README.md"
    later = SECONDS.model_copy(update={"ours": 1.0})
    store = SECONDS.model_copy(update={"name": "store-up"})
    for results in ([store], [SECONDS], [later]):
        record(results, rows, readme)
    assert stored(rows) == [later, store]
    assert readme.read_text(encoding="utf-8") == page([later, store])
    assert "| [averaging](#averaging) | 1 s | 5 s | 5.00× | 3×, met | 50% |" in readme.read_text(
        encoding="utf-8"
    )


def test_a_rows_command_is_the_one_that_was_given_without_paths_of_its_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Commands were written by hand and left sizes, rates and rounds out."""
    given = "/home/a/benchmarks/optimizers.py /data/corpus --rates 0.1 0.2 --store s3://a/b --work=/x/y --record --json"
    expected = "python benchmarks/optimizers.py CORPUS --rates 0.1 0.2 --store s3://a/b --work=Y"
    assert command_of(given.split()) == expected
    monkeypatch.setattr(sys, "argv", given.split())
    row = Result.model_validate({name: value for name, value in dict(SECONDS).items() if name != "command"})
    assert row.command == expected


def test_a_toy_size_is_not_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*arguments: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        parser.add_argument("sizes", nargs="*")
        parser.add_argument("--size")
        return parse(parser, arguments)

    assert asked("125m", "--record").record
    assert not asked("toy").record
    for arguments in (["125m", "toy", "--record"], ["--record", "--size", "toy"]):
        with pytest.raises(SystemExit):
            asked(*arguments)
        assert "--record: a toy size" in capsys.readouterr().err


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="averagings"):
        Result.model_validate(SECONDS.model_dump() | {"name": "averagings"})


def test_memory_counts_the_processes_that_a_command_starts() -> None:
    child = "held = bytearray(64 << 20); print('held', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert anonymous_bytes(process.pid) > 64 << 20
        process.stdin.write("\n")
