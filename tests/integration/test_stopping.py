"""A signal at any moment: one line and exit code 130.

While Ray is joined: tests/end_to_end/test_on_ray.py.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from btm_cluster import session
from btm_cluster.errors import Stopped
from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.plan import Plan
from btm_cluster.session import driving, opened_view
from btm_cluster.stopping import Interruption, end_at_signals, handling, unwinding

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "number", "program"),
    [
        ("typer", signal.SIGTERM, "btm"),
        ("torch", signal.SIGINT, "btm"),
        ("btm_cluster.workers.on_ray.lazily", signal.SIGTERM, "btm"),
        ("pydantic", signal.SIGTERM, "jobs/grow_forest.py"),
        ("typer", signal.SIGINT, "jobs/submit.py"),
    ],
)
def test_a_signal_while_something_is_imported_ends_in_one_error_and_exit_code_130(
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    module: str,
    number: signal.Signals,
    program: str,
) -> None:
    """It was a traceback, or a death by the bare signal, which a schedule takes for a crash."""
    arguments = [*(["run"] if program == "btm" else []), str(write_plan(fields))]
    command = [sys.executable, "-P", "-m", "tests.stopped_while_importing", module, str(int(number)), program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (130, "")
    said = [line for line in done.stderr.splitlines(keepends=True) if " INFO " not in line]
    assert said == [
        "error: the command was stopped\n",
        "  remedy:   give it again; what the store has by now is not made again\n",
    ]
    assert not Path(fields["store"]).exists()


def test_what_is_half_written_is_cleaned_up_and_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(Stopped), unwinding():
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_no_failure_of_what_it_breaks_off(number: signal.Signals) -> None:
    """Ctrl-C while a configuration was tried was told as "a gpt2 cannot read a block", with exit code 2."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_layer=1, n_embd=4, n_head=1))
    model.forward = lambda **_: signal.raise_signal(number)  # type: ignore[method-assign]
    with pytest.raises(Stopped), unwinding():
        logits_of(model, random_block(8, 4), "a gpt2")


def test_a_signal_is_heard_where_the_garbage_collector_is_at_work() -> None:
    """Ctrl-C while a library was imported: "Exception ignored in __del__", a traceback, and the run went on."""
    heard: list[str] = []

    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            heard.append("in full")

    def collect_and_go_on() -> None:
        Collected()
        threading.Event().wait(60)

    with pytest.raises(Stopped), unwinding():
        collect_and_go_on()
    assert heard == ["in full"]


def test_a_signal_after_all_is_done_changes_no_exit_code() -> None:
    """Python's end takes its handlers away before torch is gone: the command then died by the signal."""
    program = """
import os, signal
from btm_cluster.stopping import end_at_signals, end_with

class GoesLast:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)

end_at_signals()
goes_last = GoesLast()
end_with(3)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_the_second_signal_does_not_wait_until_all_is_saved_and_a_third_ends_the_process(plan: Plan) -> None:
    with handling(signal.SIG_IGN), opened_view() as view, driving(view, plan, None, True) as driver:
        driver.is_asking = True
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interruption):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM).__name__ == "end_at_once"  # type: ignore[union-attr]


def test_the_same_signal_at_once_is_the_same_and_later_another(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timeout` signals its command and then its group, and so twice."""
    monkeypatch.setattr(session, "SAME_SECONDS", 1000)
    with handling(signal.SIG_IGN), opened_view() as view, driving(view, plan, None, True) as driver:
        driver.is_asking = True
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(session, "SAME_SECONDS", 0)
        with pytest.raises(Interruption):
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_comes_again_since_the_garbage_collector_was_at_work_is_not_the_same(
    plan: Plan,
) -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def collect_and_go_on() -> None:
        Collected()
        threading.Event().wait(60)

    with pytest.raises(Stopped), opened_view() as view, driving(view, plan, None, True):
        collect_and_go_on()


def test_a_program_hears_both_signals_from_its_start() -> None:
    with handling(signal.SIG_DFL):
        end_at_signals()
        assert {signal.getsignal(number).__name__ for number in (signal.SIGTERM, signal.SIGINT)} == {
            "end_at_once"
        }  # type: ignore[union-attr]
