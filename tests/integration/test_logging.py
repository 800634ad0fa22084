"""What a command shows while it runs: a live display at a terminal, lines of a log elsewhere, and where they go."""

import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.cli import app, run_command
from tests.integration.conftest import WrittenForest
from tests.told_while_importing import MARK

REPOSITORY = Path(__file__).parents[2]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) .+")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
Btm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Btm:
    """The command line in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


def at_a_terminal(columns: int, arguments: list[str]) -> str:
    """Everything that a terminal of so many columns gets from `btm`, which must end well."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, "-P", "-m", "tests.told_while_importing", "torch", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    run = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    data = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        try:
            while piece := terminal.read(1 << 16):
                data += piece
        except OSError:  # how Linux says that nobody writes to it any more
            pass
    assert run.wait() == 0, data.decode()
    return data.decode()


def test_a_run_shows_something_before_it_imports_torch_and_never_a_hash(
    fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path]
) -> None:
    path = write_plan(fields | {"domains": fields["domains"][:2], "targets": []})
    seen = at_a_terminal(80, ["run", str(path), "--in-process"])
    before, _, after = seen.partition(MARK)
    assert "loading PyTorch…" in before
    drawn, cursor_is_back, rest = after.partition("\x1b[?25h")
    assert cursor_is_back
    progress = ESCAPES.sub("", before + drawn)
    assert "2/2 texts read · " in progress
    assert "1/1 seed trained" in progress
    assert "2/2 experts trained" in progress
    assert not re.search(r"[0-9a-f]{8}", progress)
    first, *lines = ESCAPES.sub("", rest).split("\r\n")[:-1]
    assert re.search(r"(Worth it|Not worth it|Undecided) as an ensemble: ", first)
    ending = " ".join(lines).partition(" report: ")[2]  # in as many lines as the paths' lengths take
    report, _, following = ending.partition(" next: ")
    assert report.startswith(f"{path.parent}/store/logs/")
    assert following.startswith(f"`btm report {path} --to FOLDER` writes that page anywhere, ")


def test_elsewhere_there_are_lines_with_time_and_level_on_standard_error(
    btm: Btm, fields: dict[str, Any], write_plan: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    path = write_plan(fields | {"domains": fields["domains"][:2], "targets": []})
    code, out, err = btm("run", path, "--in-process", "--json", "--log-file", tmp_path / "log")
    assert code == 0
    assert json.loads(out)["forest"]["version"] == 1
    lines = [line for line in err.splitlines() if not line.startswith(("steps run", "report: "))]
    assert all(LOG_LINE.fullmatch(line) for line in lines), err
    said = [line.partition(" INFO ")[2] for line in lines]
    for expected in (
        "loading PyTorch",
        "kitchen: reading 0.0/",
        "seed: training update 6/6 loss ",
        "seed: storing",
    ):
        assert any(line.startswith(expected) for line in said), expected
    assert any(line == "2/2 experts trained" for line in said)
    assert not re.search(r"[0-9a-f]{8}", "\n".join(lines))
    written = (tmp_path / "log").read_text().splitlines()
    assert all(LOG_LINE.fullmatch(line) for line in written)
    assert any(" DEBUG btm_cluster.terminal.log_lines: " in line for line in written)
    assert len(written) > len(lines)


def test_quiet_shows_results_alone_and_errors(btm: Btm, forest: WrittenForest, tmp_path: Path) -> None:
    code, out, err = btm("evaluate", forest.plan_path, "--in-process", "-q")
    assert (code, err) == (0, "")
    assert "Perplexity on test text" in out
    assert "steps run" not in out
    code, out, err = btm("evaluate", tmp_path / "none.yaml", "-q")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


def test_verbose_shows_what_happens_in_detail(btm: Btm, forest: WrittenForest) -> None:
    usual = btm("evaluate", forest.plan_path, "--in-process")[2]
    code, _, err = btm("evaluate", forest.plan_path, "--in-process", "--verbose")
    assert code == 0
    assert "DEBUG" not in usual
    assert logging.getLogger("btm_cluster").level == logging.NOTSET  # as before
    code, out, err = btm("evaluate", forest.plan_path, "-q", "-v")
    assert (code, out) == (2, "")
    assert "--quiet and --verbose exclude each other" in err


def test_a_log_file_that_cannot_be_written_is_refused_before_anything_is_done(
    btm: Btm, forest: WrittenForest, tmp_path: Path
) -> None:
    code, out, err = btm("evaluate", forest.plan_path, "--log-file", tmp_path / "none" / "log")
    assert (code, out) == (2, "")
    assert "cannot be written" in err
    assert "INFO" not in err


def test_a_log_file_on_a_full_disk_is_given_up_with_a_warning(btm: Btm, forest: WrittenForest) -> None:
    code, out, err = btm("evaluate", forest.plan_path, "--in-process", "--log-file", "/dev/full")
    assert code == 0
    assert out
    assert err.count("/dev/full cannot be written any more, and is given up") == 1
    assert "Traceback" not in err


JSON_COMMANDS = {
    "evaluate": ["evaluate", "{plan}", "--in-process"],
    "expand": ["expand", "{plan}", "--in-process"],
    "merge": ["merge", "{plan}", "--in-process", "--weights", "uniform", "--to", "{folder}/merged"],
    "export": ["export", "{plan}", "--in-process", "--seed", "--to", "{folder}/exported"],
    "generate": ["generate", "{plan}", "--in-process", "--prompt", "a", "--max-new-tokens", "2"],
    "score": ["score", "--plan", "{plan}", "--in-process", "--text", "a text"],
    "plan": ["plan", "{plan}"],
    "forest show": ["forest", "show", "--store", "{store}"],
    "forest log": ["forest", "log", "--store", "{store}"],
    "forest verify": ["forest", "verify", "--store", "{store}"],
    "forest contributions": ["forest", "contributions", "--store", "{store}"],
}


@pytest.mark.parametrize("name", JSON_COMMANDS)
def test_json_is_alone_on_standard_output(btm: Btm, forest: WrittenForest, tmp_path: Path, name: str) -> None:
    known = {"plan": forest.plan_path, "store": forest.plan.store, "folder": tmp_path}
    code, out, _ = btm(*(part.format(**known) for part in JSON_COMMANDS[name]), "--json", "-v")
    assert code == 0
    rest, reader = out.strip(), json.JSONDecoder()
    while rest:
        value, end = reader.raw_decode(rest)
        assert isinstance(value, dict | list)
        rest = rest[end:].lstrip()


def test_a_program_sees_progress_on_standard_error_or_where_its_own_logging_says(
    forest: WrittenForest,
) -> None:
    program = f"""
import logging
import btm_cluster as btm
opened = btm.open_forest({str(forest.plan_path)!r}, in_process=True)
opened.verdict()
assert not logging.getLogger("btm_cluster").handlers
logging.basicConfig(format="theirs: %(message)s", level=logging.INFO)
opened.verdict()
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.endswith(" opening the store")]
    assert [LOG_LINE.fullmatch(line) is not None for line in said] == [True, False]
    assert said[1] == "theirs: opening the store"
