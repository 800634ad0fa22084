"""The timeline of a run: `logs/<run>/timeline.json`, written anew while it goes on.

Only what a budget counts depends on it: it is there to be looked at. All times are seconds since 1970 by the driver's clock.
"""

import itertools
import os
import socket
import time
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from btm_cluster.errors import MissingError, UserError, one_line
from btm_cluster.ledger.ledger import Ledger
from btm_cluster.ledger.records import LOGS
from btm_cluster.storage.scratch import scratch_folder

TIMELINE_FILE = "timeline.json"
MOST_EVENTS = 5_000
"""In one timeline: about 1.5 MB."""
MOST_CAUSE = 500
"""Characters of a cause."""

_NUMBERS = itertools.count()
"""Counts the runs of this process, since several may begin within a second."""

What: TypeAlias = Literal["step", "start", "checkpoint", "wait", "failure", "stop"]
Outcome: TypeAlias = Literal["running", "done", "failed", "stopped"]
Amount = Annotated[FiniteFloat, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Node(_Record):
    """A machine and what it has."""

    name: str
    gpus: Amount
    cpus: Amount


class Event(_Record):
    """One thing that took time, or happened at once (`began` equals `ended`)."""

    what: What
    """step: it ran. start: its process was started early, and got ready. checkpoint: training stalled, and its
    state was then stored. wait: it was asked for, and had no place yet. failure: an attempt that came to
    nothing. stop: the run was asked to stop, and trainings saved."""
    kind: str
    """The step's name, such as `train` or `score`; `run` for what concerns all of it."""
    label: str
    """The name that progress shows."""
    domain: str | None = None
    role: str | None = None
    """seed, expert, transformer-lm or demix; None for other steps than training."""
    node: str | None = None
    """Its key in `nodes`: of a group, the first rank's; None where it is not known."""
    process: str = "task"
    """The actor's name, or `task`."""
    gpus: Amount = 0.0
    """Held meanwhile, over all processes of a group."""
    cpus: Amount = 0.0
    began: FiniteFloat
    ended: FiniteFloat
    attempt: int = 1
    cause: str | None = None
    """Why it failed or was stopped; of a checkpoint, how long training stalled."""

    @property
    def seconds(self) -> float:
        """Its duration in seconds."""
        return self.ended - self.began

    @property
    def holds(self) -> bool:
        """Whether GPUs and CPUs were held for it alone: what a run costs is the sum over these."""
        return self.what in ("step", "start", "failure")


class Timeline(_Record):
    """A run of a command."""

    command: str
    began: FiniteFloat
    ended: FiniteFloat
    """End of the run; while it is under way, or if its driver was killed, the time of the last writing."""
    outcome: Outcome = "running"
    nodes: dict[str, Node]
    events: list[Event]
    """In order of their beginnings."""
    left_out: int = 0
    """Short steps beyond MOST_EVENTS, which the sums have."""
    gpu_seconds: Amount
    cpu_seconds: Amount


def new_run_name() -> str:
    """The name of a run that begins now: later ones sort behind it."""
    number = next(_NUMBERS)
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{socket.gethostname()}-{os.getpid()}"
    return f"{name}-{number}" if number else name


def run_key(run: str, file: str) -> str:
    """The key of a file of a run: its timeline, its report, a training's curves."""
    return f"{LOGS}{run}/{file}"


def write_timeline(ledger: Ledger, run: str, timeline: Timeline) -> None:
    """Stores a run's timeline over what is there.

    Raises:
        StoreError: the store does not take it.
    """
    with scratch_folder() as folder:
        file = folder / TIMELINE_FILE
        file.write_text(timeline.model_dump_json(), encoding="utf-8")
        ledger.storage.upload(run_key(run, TIMELINE_FILE), file)


def read_timeline(ledger: Ledger, run: str) -> Timeline:
    """The timeline of a run.

    Raises:
        UserError: the store has none of it, or what it has is no timeline.
    """
    key = run_key(run, TIMELINE_FILE)
    try:
        data = ledger.storage.read(key)
    except MissingError as exc:
        known = list_runs(ledger)
        shown = ", ".join(known[:3]) + (", …" if len(known) > 3 else "")
        raise UserError(
            f"the store has no timeline of the run {run!r}",
            expected=f"{key}; of {shown}" if known else key,
            remedy="name another; a run that found everything made leaves none",
        ) from exc
    try:
        return Timeline.model_validate_json(data)
    except ValidationError as exc:
        raise UserError(
            f"{key} is no timeline",
            found=one_line(exc),
            expected="the fields that this version of btm_cluster writes",
            remedy="use the version that wrote it, or delete it: a budget no longer counts that run then",
        ) from exc


def list_runs(ledger: Ledger) -> list[str]:
    """Names of the runs that left a timeline, the newest first."""
    keys = (entry.key.split("/") for entry in ledger.storage.list(LOGS))
    return sorted((parts[1] for parts in keys if len(parts) == 3 and parts[2] == TIMELINE_FILE), reverse=True)
