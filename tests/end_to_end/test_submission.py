"""A schedule's submitter on a real cluster: killed, started again, late, and with a job that fails."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from btm_cluster.errors import StepError
from btm_cluster.workers.on_ray import submission
from btm_cluster.workers.on_ray.submission import Step, choose_step
from tests.end_to_end.conftest import REPOSITORY, Btm


@pytest.fixture
def submit(cluster: dict[str, str], tmp_path: Path) -> Callable[[str, str], Btm]:
    """Starts the submitter for a tick, with a shell script as the job."""
    count = iter(range(100))
    program = (sys.executable, str(REPOSITORY / "jobs" / "submit.py"))

    def start(tick: str, script: str) -> Btm:
        command = ["hourly", tick, "--", "sh", "-c", script]
        return Btm(command, cluster, tmp_path / f"log-{next(count)}", program)

    return start


def test_a_job_outlives_its_submitter_the_next_one_waits_for_it_and_a_later_tick_is_left_out(
    submit: Callable[[str, str], Btm], tmp_path: Path
) -> None:
    folder = shlex.quote(str(tmp_path))
    script = f"echo begun >> {folder}/begun; until test -e {folder}/go; do sleep 0.1; done; echo it is finished; exit 3"
    killed = submit("at-1", script)
    killed.wait_until_said("at-1-1: submitted")
    killed.process.kill()
    killed.exit_code()
    again, later = submit("at-1", script), submit("at-2", script)
    again.wait_until_said("at-1-1: runs already, waiting for it")
    assert later.exit_code() == 0
    assert "at-1-1 of this schedule still runs: nothing is submitted" in later.said
    (tmp_path / "go").touch()
    assert again.exit_code() == 3, again.said
    assert "| it is finished" in again.said
    assert "at-1-1: FAILED" in again.said
    assert (tmp_path / "begun").read_text() == "begun\n"
    third = submit("at-1", "true")
    assert third.exit_code() == 0, third.said
    assert "at-1-2: submitted" in third.said
    assert submit("at-1", "false").exit_code() == 0


def test_a_submitter_that_no_cluster_answers_says_so(cluster: dict[str, str], tmp_path: Path) -> None:
    program = (sys.executable, str(REPOSITORY / "jobs" / "submit.py"))
    nowhere = Btm(
        ["s", "t", "--", "true"], cluster | {"RAY_ADDRESS": "http://127.0.0.1:9"}, tmp_path / "log", program
    )
    assert nowhere.exit_code() == 2, nowhere.said
    assert "no jobs can be submitted at http://127.0.0.1:9" in nowhere.said
    assert "Traceback" not in nowhere.said


def test_a_dashboard_that_stumbles_is_one_error_and_a_log_that_is_lost_hides_no_exit_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail_for_now(*_: str) -> None:
        raise RuntimeError("Request failed with status code 500")

    ended = SimpleNamespace(submission_id="t-1", status=JobStatus.FAILED, metadata={}, driver_exit_code=2)
    client = SimpleNamespace(
        list_jobs=fail_for_now, submit_job=lambda **_: None, get_job_info=lambda _: ended
    )
    client.get_job_logs = fail_for_now
    monkeypatch.setattr(submission, "_client", lambda _: client)
    said: list[str] = []
    with pytest.raises(StepError, match="does not say which jobs it has"):
        submission.submit_and_wait("http://head", "s", "t", "true", {}, said.append)
    client.list_jobs = list
    assert submission.submit_and_wait("http://head", "s", "t", "true", {}, said.append) == 2
    assert "| its log cannot be read: Request failed with status code 500" in said


def test_another_schedules_job_is_no_reason_to_leave_a_tick_out() -> None:
    running = SimpleNamespace(status=JobStatus.RUNNING, metadata={"schedule": "nightly"})
    assert choose_step("hourly", "at-1", {"other": running}) == Step("submit", "at-1-1")  # type: ignore[dict-item]
    assert choose_step("nightly", "at-1", {"other": running}) == Step("skip", "other")  # type: ignore[dict-item]
