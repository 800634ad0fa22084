"""What a run's progress looks like, at terminals of several widths and in a log."""

import io
import logging
import re
import threading

import pytest
from rich.console import Console

from btm_cluster.driver.port import Failure
from btm_cluster.requests.progress import Counter, Progress
from btm_cluster.terminal.amounts import amount, duration, rate, time_left
from btm_cluster.terminal.log_lines import line_of
from btm_cluster.terminal.logs import logging_to
from btm_cluster.terminal.progress import ProgressView
from tests.progress_steps import Clock, at_update, made, reading, scoring, tokenising, training

SEED = training("seed", "seed", 0, 100)
NAMES = ["kitchen", "harbour", "a-domain-with-quite-a-long-name"]
EXPERTS = [training(name, "expert", 100, 200) for name in NAMES]
HASH = re.compile(r"[0-9a-f]{8}")


def console(width: int, height: int = 40) -> Console:
    """A terminal that keeps what is printed."""
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=height)


def shown(view: ProgressView, terminal: Console) -> list[str]:
    """The lines on the screen now."""
    with terminal.capture() as capture:
        terminal.print(view.screen())
    return [line.rstrip() for line in capture.get().splitlines()]


def view_of_a_run(terminal: Console) -> ProgressView:
    """A run whose seed is trained, whose experts train, and whose first scores are there."""
    clock = Clock()
    view = ProgressView(terminal, clock)
    for name in NAMES:
        view.found(reading(name), made(reading(name).ref))
        view.found(tokenising(name), made(tokenising(name).ref, tokens=3000))
    view.ask([SEED, *EXPERTS, *(scoring(name, SEED) for name in NAMES)])
    view(at_update(SEED, 0))
    clock.now = 100.0
    view.end(SEED, made(SEED.ref))
    view.end(scoring("kitchen", SEED), made(scoring("kitchen", SEED).ref))
    for expert, update in zip(EXPERTS, (125, 150, 175), strict=True):
        view(at_update(expert, update, loss=4.25))
    view(Progress("with seed", "scoring", 1200, 3600, "blocks", 410.0))
    return view


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_run_is_shown_at_any_width_with_every_domain_and_no_cut_number(width: int) -> None:
    terminal = console(width)
    lines = shown(view_of_a_run(terminal), terminal)
    text = "\n".join(lines)
    assert all(len(line) <= width for line in lines)
    assert not HASH.search(text)
    assert re.search(r"\d+%  2 min so far, about \d min left", text)
    for counted in ("3/3 texts read", "1/1 seed trained", "0/3 experts trained", "1/3 scores"):
        assert counted in text
    for name, share in (
        ("training kitchen", "25%"),
        ("training harbour", "50%"),
        ("scoring with seed", "33%"),
    ):
        (row,) = [line for line in lines if line.startswith(name)]
        assert (share in row) == (width == 40)
    for count in ("update 125/200", "update 150/200", "update 175/200", "1,200/3,600 blocks"):
        assert (count in text) == (width > 40)
    assert ("loss 4.250" in text) == (width > 40)
    assert ("4,782 tokens/s" in text) == (width >= 120)
    assert "410 blocks/s" in text or width == 40
    assert not re.search(r"\d…", text)


def test_what_has_ended_folds_into_its_count_and_a_failure_stays_with_its_domain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = console(80)
    with logging_to():
        view = view_of_a_run(terminal)
        view.end(EXPERTS[0], made(EXPERTS[0].ref))
        view.end(EXPERTS[1], Failure("harbour", 3, "on node-7", "out of memory"))
        view.end(
            scoring("harbour", SEED), Failure("harbour under seed", 0, "not started", "its input failed")
        )
    text = "\n".join(shown(view, terminal))
    assert "1/3 experts trained (1 failed)" in text
    assert "training kitchen" not in text
    assert "training harbour" not in text
    said = capsys.readouterr().err
    assert "ERROR harbour failed after 3 attempt(s), on node-7: out of memory" in said
    assert "its input failed" not in said


def test_more_rows_than_the_terminal_has_lines_are_counted() -> None:
    terminal = console(80, height=12)
    view = ProgressView(terminal, Clock())
    many = [training(f"domain-{i:02}") for i in range(64)]
    view.ask(many)
    for request in many:
        view(at_update(request, 150))
    lines = shown(view, terminal)
    assert len(lines) <= 11
    assert re.fullmatch(r"and \d\d more", lines[-1])


def test_before_a_step_runs_the_screen_says_what_is_done() -> None:
    terminal = console(80)
    view = ProgressView(terminal, Clock())
    view.say("starting Ray")
    assert shown(view, terminal) == ["0 s so far", "starting Ray…"]
    view.ask([SEED])
    assert shown(view, terminal)[-1] == "waiting for the next steps to start…"
    view(Progress("seed", "waiting", note="for a free GPU"))
    assert shown(view, terminal)[-1].split("  ")[0] == "waiting seed"
    assert "for a free GPU" in shown(view, terminal)[-1]


def test_of_several_parts_the_one_under_way_is_named_and_nothing_is_said_of_the_end() -> None:
    terminal = console(80)
    view = view_of_a_run(terminal)
    view.part("part 2 of 6: small, random seed 1")
    assert shown(view, terminal)[0] == "2 min so far, part 2 of 6: small, random seed 1"


@pytest.mark.parametrize("width", [40, 120])
def test_a_table_of_trials_stands_above_the_steps_until_it_ends(width: int) -> None:
    terminal = console(width)
    view = view_of_a_run(terminal)
    table = "\n".join(f"| trial-{number} | RUNNING | {'0' * 40} |" for number in (1, 2))
    view.table(table)
    lines = shown(view, terminal)
    first = next(number for number, line in enumerate(lines) if "trial-1" in line)
    assert "trial-2" in lines[first + 1], "a line that is too long is cut, not wrapped"
    assert "training kitchen" in "".join(lines[first + 2 :])
    assert all(len(line) <= width for line in lines)
    view.table("")
    assert "trial" not in "".join(shown(view, terminal))


def test_a_live_display_is_drawn_when_it_is_opened_and_gone_when_it_is_closed() -> None:
    terminal = console(80)
    written = terminal.file
    assert isinstance(written, io.StringIO)
    with ProgressView(terminal, Clock()) as view:
        assert "0 s so far" in written.getvalue()
        view.say("loading PyTorch")
        assert "loading PyTorch" in written.getvalue()
    assert written.getvalue().endswith("\x1b[1A\x1b[2K")


def test_a_dumb_terminal_and_a_quiet_command_have_no_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    with logging_to(quiet=True), ProgressView(terminal := console(80), Clock()) as view:
        view.say("loading PyTorch")
    assert terminal.file.getvalue() == ""  # type: ignore[attr-defined]
    monkeypatch.setenv("TERM", "dumb")
    with ProgressView(terminal := console(80), Clock()) as view:
        view.say("loading PyTorch")
    assert terminal.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_terminal_that_should_have_no_colours_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> str:
        terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
        with terminal.capture() as capture:
            terminal.print(view_of_a_run(terminal).screen())
        return capture.get()

    colour = re.compile(r"\x1b\[(?:\d+;)*[39][0-7]m")
    assert colour.search(drawn())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(drawn())


def test_a_log_has_a_line_for_each_phase_and_then_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "btm_cluster")
    clock = Clock()
    view = ProgressView(Console(file=io.StringIO()), clock)
    view.ask([SEED])
    view(Progress("seed", "loading"))
    for update in range(1, 101):
        clock.now += 1.0
        view(at_update(SEED, update))
    view(Progress("seed", "storing"))
    view.end(SEED, made(SEED.ref))
    lines = [record.getMessage() for record in caplog.records]
    training_lines = [line for line in lines if line.startswith("seed: training")]
    assert training_lines[0] == "seed: training update 1/100 loss 3.000 4,782 tokens/s about 1 min left"
    assert training_lines[-1].startswith("seed: training update 100/100")
    assert 7 <= len(training_lines) <= 9
    assert [line for line in lines if line not in training_lines] == [
        "seed: loading",
        "1 min so far, less than a minute left: 0/1 seed trained",
        "seed: storing",
        "1/1 seed trained",
    ]


def test_counted_steps_report_at_their_beginning_and_once_a_second() -> None:
    class Keeps:
        def __init__(self) -> None:
            self.told: list[Progress] = []

        def report(self, progress: Progress) -> None:
            self.told.append(progress)

        def stopping(self) -> bool:
            return False

        def saving(self) -> bool:
            return False

    clock, control = Clock(), Keeps()
    counter = Counter(control, "kitchen", "tokenising", 40, "documents", clock)
    for _ in counter.over(range(40)):
        clock.now += 0.25
    assert [(one.done, one.per_second) for one in control.told[:3]] == [(0, None), (4, 4.0), (8, 4.0)]
    assert len(control.told) == 11
    assert control.told[-1].share == 1.0


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress("k", "reading", 1_200_000_000, 4_000_000_000, "bytes"), "1.2/4.0 GB"),
        (Progress("k", "reading", 1_500, unit="bytes"), "1.5 kB"),
        (Progress("k", "reading", 12, unit="bytes"), "12.0 bytes"),
        (Progress("k", "reading", 12_345, unit="documents"), "12,345 documents"),
        (Progress("k", "tokenising", 5, 4_000, "documents"), "5/4,000 documents"),
        (Progress("k", "training", 9, 100, "updates"), "update 9/100"),
        (Progress("k", "fitting", 0, unit="methods"), ""),
        (Progress("k", "storing"), ""),
    ],
)
def test_amounts_have_their_unit(progress: Progress, words: str) -> None:
    assert amount(progress) == words


def test_rates_have_their_unit() -> None:
    assert rate(Progress("k", "reading", unit="bytes", per_second=35_200_000.0)) == "35.2 MB/s"
    assert rate(Progress("k", "mixing", unit="methods", per_second=1.26)) == "1.3 methods/s"
    assert rate(Progress("k", "scoring", unit="blocks", per_second=1234.5)) == "1,234 blocks/s"
    assert rate(Progress("k", "storing")) == ""


@pytest.mark.parametrize(
    ("seconds", "words", "left"),
    [
        (0, "0 s", "less than a minute left"),
        (59, "59 s", "less than a minute left"),
        (60, "1 min", "about 1 min left"),
        (3_500, "58 min", "about 58 min left"),
        (3_599, "1 h", "about 1 h left"),
        (12_100, "3 h 22 min", "about 3 h 20 min left"),
        (187_300, "2 d 4 h", "about 2 d 4 h left"),
    ],
)
def test_durations_are_as_rough_as_they_are_long(seconds: int, words: str, left: str) -> None:
    assert duration(seconds) == words
    assert time_left(seconds) == left


def test_a_line_says_why_a_training_is_killed() -> None:
    told = Progress("kitchen", "hanging", note="without an update for 20 min, killed")
    assert line_of(told) == "kitchen: hanging without an update for 20 min, killed"


def test_the_thread_that_draws_waits_for_nobody_who_tells_of_something() -> None:
    # It holds the terminal, for which a line of the log waits in turn.
    terminal = console(80)
    view = view_of_a_run(terminal)
    before = view.screen()
    told, drawn = threading.Event(), threading.Event()

    class Waiting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
            told.set()
            assert drawn.wait(10), "the screen was waited for"

    handler, logger = Waiting(), logging.getLogger("btm_cluster.terminal.log_lines")
    logger.addHandler(handler)
    teller = threading.Thread(target=view.end, args=(EXPERTS[0], Failure("kitchen", 1, "here", "it fell")))
    try:
        teller.start()
        assert told.wait(10)
        assert view.screen() == before
        drawn.set()
        teller.join(10)
    finally:
        logger.removeHandler(handler)
    assert not teller.is_alive()
    assert view.screen() != before
