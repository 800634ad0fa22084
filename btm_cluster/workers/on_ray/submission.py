"""Submitting a job for a schedule: once for each tick, however often the submitter dies and is started again.

A job outlives its submitter. So a submitter first looks for what an earlier one has begun: it waits for that,
tries again what failed, and leaves a tick out while the previous one's job still runs.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from btm_cluster.errors import StepError, UserError, one_line

POLL_SECONDS = 2.0
AGENT_SECONDS = 120.0
"""A head that was just started takes jobs only once its agent is up."""
LOG_LINES = 30
TRANSIENT_ERRORS = (RuntimeError, OSError, AuthenticationError)
"""Exceptions of the client where the dashboard fails, is silent or does not know
us; those of `requests` are OSErrors."""
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """The decision of a submitter: submit `job`, wait for it, or nothing, since
    it is done or another tick's still runs."""

    do: str
    job: str


def choose_step(schedule: str, tick: str, jobs: Mapping[str, JobDetails]) -> Step:
    """From the jobs that the cluster knows, by submission id, to what comes next for this tick."""
    attempt = 1
    while (job := f"{tick}-{attempt}") in jobs:
        status = jobs[job].status
        if status == JobStatus.SUCCEEDED:
            return Step("done", job)
        if not status.is_terminal():
            return Step("wait", job)
        attempt += 1
    for other, details in jobs.items():
        if (details.metadata or {}).get("schedule") == schedule and not details.status.is_terminal():
            return Step("skip", other)
    return Step("submit", job)


def submit_and_wait(
    address: str, schedule: str, tick: str, entrypoint: str, variables: Mapping[str, str], say: Say
) -> int:
    """Sees a tick's job through to its end; returns its exit code, or 0 where the tick is left out.

    Raises:
        UserError: no cluster answers, or it refuses the token.
        StepError: the job was stopped, the cluster lost it, or its dashboard had a transient error; a later
        try may succeed.
    """
    client = _client(address)
    step = choose_step(schedule, tick, _jobs(client, address))
    if step.do == "skip":
        say(f"{step.job} of this schedule still runs: nothing is submitted, the next tick looks again")
        return 0
    if step.do == "submit":
        job = {"submission_id": step.job, "entrypoint": entrypoint, "metadata": {"schedule": schedule}}
        _submit(client, job | {"runtime_env": {"env_vars": dict(variables)}}, say)
    words = {"submit": "submitted", "wait": "runs already, waiting for it", "done": "has ended well already"}
    say(f"{step.job}: {words[step.do]}")
    return _await_end(client, step.job, say)


def try_job(address: str, seconds: float) -> None:
    """Submits a job that does nothing and sees it through.

    Raises:
        UserError, StepError: it did not end well, or not within so many seconds.
    """
    deadline = time.monotonic() + seconds
    client = _client(address)
    job = f"btm-doctor-{uuid.uuid4().hex[:8]}"
    _submit(client, {"submission_id": job, "entrypoint": "true"}, lambda _: None, seconds)
    details: Any = client.get_job_info(job)
    while not details.status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            raise StepError(
                f"{job}, which does nothing, did not end within {seconds:g} s", found=details.status.value
            )
        time.sleep(POLL_SECONDS / 4)
        details = client.get_job_info(job)
    if details.status != JobStatus.SUCCEEDED:
        raise StepError(
            f"{job}, which does nothing, did not end well", found=details.message or details.status.value
        )


def _client(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except Exception as exc:  # of whatever kind Ray has for it; a service that is none answers in odd ways
        raise UserError(
            f"no jobs can be submitted at {address}",
            found=one_line(exc),
            expected="the address of a Ray dashboard, and its token in RAY_AUTH_TOKEN",
            remedy="`btm doctor` with this RAY_ADDRESS says more",
        ) from exc


def _jobs(client: JobSubmissionClient, address: str) -> dict[str, JobDetails]:
    """The jobs that the cluster knows, by submission id."""
    try:
        return {details.submission_id: details for details in client.list_jobs() if details.submission_id}
    except TRANSIENT_ERRORS as exc:
        raise StepError(
            f"the cluster at {address} does not say which jobs it has",
            found=one_line(exc),
            remedy="submit it again: it takes up what has begun",
        ) from exc


def _submit(
    client: JobSubmissionClient, job: Mapping[str, Any], say: Say, seconds: float = AGENT_SECONDS
) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            client.submit_job(**job)
            return
        except TRANSIENT_ERRORS as exc:
            if "No available agent" not in str(exc) or time.monotonic() > deadline:
                raise StepError(  # another submitter of this tick was faster, or the cluster went away
                    f"{job['submission_id']} could not be submitted",
                    found=one_line(exc),
                    remedy="submit it again: it takes up what has begun",
                ) from exc
        say("the cluster takes no jobs yet, trying again")
        time.sleep(POLL_SECONDS)


def _await_end(client: JobSubmissionClient, job: str, say: Say) -> int:
    """Waits, shows the end of the log, and returns the driver's exit code."""
    while True:
        try:
            details: Any = client.get_job_info(job)
        except TRANSIENT_ERRORS as exc:
            raise StepError(
                f"{job}: the cluster does not answer, or does not know it any more",
                found=one_line(exc),
                remedy="if the head was started anew, the job went with it; submitted again, it goes on from "
                "the store",
            ) from exc
        if details.status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    for line in _log_lines(client, job):
        say(f"| {line}")
    say(f"{job}: {details.status.value}")
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is None:
        raise StepError(f"{job} did not end by itself", found=details.message or details.status.value)
    return int(details.driver_exit_code)


def _log_lines(client: JobSubmissionClient, job: str) -> list[str]:
    """The end of its log: an ended job's exit code is worth more, so a log that cannot be had is no error."""
    try:
        return list(client.get_job_logs(job).splitlines()[-LOG_LINES:])
    except TRANSIENT_ERRORS as exc:
        return [f"its log cannot be read: {one_line(exc)}"]
