"""What is printed arrives: in a terminal of any encoding and width, and with
an error of ours where it cannot."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from btm_cluster.cli import app, run_command
from btm_cluster.requests.progress import Progress
from btm_cluster.terminal.logs import logging_to
from btm_cluster.terminal.output import CLOSED_PIPE, safe_output, wrapped
from btm_cluster.terminal.progress import ProgressView
from btm_cluster.terminal.tables import consoles, plain_table, progress_console, say, show_table


@pytest.fixture
def printed_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], object]], bytes]:
    """What a command writes to a standard output of an encoding, as bytes; it must end well."""

    def print_in(encoding: str, command: Callable[[], object]) -> bytes:
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run_command(command) == 0
        return written.getvalue()

    return print_in


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "utf-16"])
def test_a_table_and_a_sentence_stay_readable_in_any_encoding(
    encoding: str, printed_in: Callable[[str, Callable[[], object]], bytes]
) -> None:
    def show() -> None:
        console = consoles(False)[0]
        show_table(
            plain_table("Interval", ["system", "perplexity"], [["naïve–Bäcker", "3.10–3.50"]]), console
        )
        print("3 × 日本 \udcff 🌲")

    shown = printed_in(encoding, show).decode(encoding)
    assert "3.10-3.50" in shown or "3.10–3.50" in shown
    assert "Interval" in shown
    assert "\\udcff" in shown
    if not encoding.startswith("utf"):
        assert "\\u65e5\\u672c" in shown
        assert "\\U0001f332" in shown
        assert "3 x " in shown or "3 × " in shown


def test_the_reference_of_a_plan_is_printed_in_ascii(printed_in: Callable[..., bytes]) -> None:
    assert b"## `training`" in printed_in("ascii", lambda: app(["schema", "--markdown"]))


def test_json_says_the_same_in_any_encoding_and_is_never_coloured(
    printed_in: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    plain = printed_in("utf-8", lambda: app(["schema"]))
    assert json.loads(plain)
    assert printed_in("latin-1", lambda: app(["schema"])) == plain


def test_square_brackets_and_colons_are_shown_as_they_are(printed_in: Callable[..., bytes]) -> None:
    def show() -> None:
        console = consoles(False)[0]
        show_table(plain_table("of [v2]", ["[/name]"], [["data [red]/:fire:.jsonl"]]), console)
        with logging_to():
            ProgressView(progress_console())(Progress("a[b]", "reading", note="data [v2]"))

    shown = printed_in("utf-8", show).decode()
    for part in ("of [v2]", "[/name]", "data [red]/:fire:.jsonl", "a[b]: reading data [v2]"):
        assert part in shown


@pytest.mark.parametrize("columns", [1, 20, 80])
def test_a_narrow_terminal_cuts_no_name_and_no_number(columns: int) -> None:
    console = Console(file=io.StringIO(), width=columns)
    names = [f"a-text-with-a-long-name-{i}" for i in range(12)]
    table = plain_table("Perplexity", ["system", *names], [["the ensemble", *["1,234.56"] * 12]])
    table.columns[0].no_wrap = True
    show_table(table, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in shown for name in names)
    assert shown.count("1,234.56") == 12
    assert "the ensemble" in shown


@pytest.mark.parametrize("columns", [1, 30, 50])
def test_a_narrow_terminal_cuts_no_word_where_another_column_could_give_way(columns: int) -> None:
    """Rich takes from the widest columns first, which are those of identities as often as of sentences."""
    console = Console(file=io.StringIO(), width=columns)
    rows = [
        ["code", "260ce3c80989", "2026-11-29T03:44:48+00:00", "the seed, and an average of three experts"]
    ]
    show_table(plain_table("Forest", ["domain", "expert", "when", "branched from"], rows), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for cell in rows[0] for word in cell.split())
    assert "…" not in shown


def test_at_a_terminal_lines_break_between_words_and_elsewhere_not_at_all() -> None:
    """Terminals break them anywhere, and what is piped may be cut by whatever reads it."""
    said = "the text of 'a' has a bad document\n  remedy:   mend it, or skip such documents as they come"
    narrow = wrapped(said, 30)
    assert narrow.split() == said.split()
    assert narrow.splitlines()[-1] == " " * 12 + "they come"
    assert max(map(len, narrow.splitlines())) <= 30
    assert wrapped("see /a/path/that/is/longer", 10) == "see\n/a/path/that/is/longer"
    assert wrapped("next: `btm run PLAN` goes on", 12) == "next:\n`btm run PLAN`\ngoes on", (
        "a command stays one"
    )
    assert wrapped(said, None) == said
    sentence = "a sentence of several words " * 20
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=60, force_terminal=is_terminal)
        say(sentence, console)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert (len(lines) > 1) == is_terminal
        assert all(set(line.split()) <= set(sentence.split()) for line in lines)


class Full(io.RawIOBase):
    """A disk without room, or a pipe without a reader."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise self._error


FULL, CLOSED = OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(("error", "code"), [(FULL, 1), (CLOSED, CLOSED_PIPE)])
@pytest.mark.parametrize("characters", [1, 100_000])
def test_output_that_cannot_be_written_is_an_error_of_its_own(
    error: OSError,
    code: int,
    characters: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Full(error)), "utf-8"))
    assert run_command(lambda: print("x" * characters)) == code
    said = capsys.readouterr().err
    assert ("No space left on device" in said) == (code == 1)


def test_what_cannot_be_written_to_standard_error_changes_no_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Full(FULL)), "utf-8"))
    assert run_command(lambda: app(["plan", "none.yaml"])) == 2


def test_a_run_goes_on_where_its_progress_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Full(CLOSED), 1), "utf-8", write_through=True)
    )

    def run() -> None:
        with logging_to(), ProgressView(progress_console()) as view:
            view(Progress("seed", "reading"))
            view(Progress("seed", "training"))
        raise SystemExit(3)

    assert run_command(run) == 3


def test_control_characters_in_an_error_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: app(["plan", "a\x1b[2Jb.yaml"])) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "a?[2Jb.yaml" in said


ENDS_INPUT = """
import os, sys
from btm_cluster.terminal.output import end_input, safe_output
with safe_output() as output:
    end_input()
    assert not sys.stdin.isatty()
    with open(__file__) as file:
        assert file.fileno() > 2  # or what other libraries print would be written to a file of ours
    os.write(1, b"by another library")
    print("by us")
    output.flush()
raise SystemExit(7)
"""
SHELL = {
    "a full disk": ("{btm} schema > /dev/full", 1),
    "a closed standard output": ("{btm} schema >&-", 0),
    "a closed standard error": ("{btm} plan none.yaml 2>&-", 2),
    "no standard stream at all": ("{python} <&- >&- 2>&-", 7),
    "a prompt from a closed standard input": ("{btm} init >&2 && {btm} generate plan.yaml --prompt - <&-", 2),
    "a folder that is gone": ("mkdir gone && cd gone && rmdir ../gone && {btm} schema > /dev/null", 2),
    "a reader that has gone": ("{btm} schema", CLOSED_PIPE),
}


@pytest.mark.parametrize("case", SHELL)
def test_a_command_ends_without_a_traceback_and_with_its_exit_code(case: str, tmp_path: Path) -> None:
    command, code = SHELL[case]
    btm, python = f"{sys.executable} -P -m btm_cluster", f"{sys.executable} {tmp_path / 'ends_input.py'}"
    (tmp_path / "ends_input.py").write_text(ENDS_INPUT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["bash", "-c", command.format(btm=btm, python=python)],
            cwd=tmp_path,
            env=environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("given", ["", "<&-"])
def test_what_is_piped_in_answers_no_question_here_or_in_a_process_that_is_started(given: str) -> None:
    """`yes | btm plan plan.yaml` once answered a library that asked whether to run a model's own code."""
    program = """
import subprocess
from btm_cluster.terminal.output import end_input
end_input()
assert subprocess.run(["cat"], capture_output=True).stdout == b""
try:
    input("run its code? [y/N]")
except EOFError:
    raise SystemExit(7)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["bash", "-c", f'exec {sys.executable} -c "$0" {given}', program]
    done = subprocess.run(command, input="y\n", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr


def test_streams_are_given_back() -> None:
    before = sys.stdout
    with safe_output():
        assert sys.stdout is not before
    assert sys.stdout is before


def test_what_a_library_prints_in_a_thread_of_its_own_goes_to_the_log_and_not_among_results(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    # Ray does, when a process of the cluster dies: a run's JSON began with it.
    with caplog.at_level(logging.INFO), safe_output():
        thread = threading.Thread(
            target=print, args=("\x1b[33m(raylet)\x1b[0m A worker died\n\nTask failed",)
        )
        thread.start()
        thread.join()
        print("{}")
    assert capsys.readouterr().out == "{}\n"
    assert caplog.messages == ["(raylet) A worker died", "Task failed"]
