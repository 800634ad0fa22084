"""Decides what to do about one step that runs on the cluster: nothing, say that
it waits for capacity, or kill it.

A pure function of the step's state, its newest progress report and the time; the caller polls, acts and keeps
the new state. Knows nothing of Ray or of processes.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from btm_cluster.requests.progress import Progress

STARTING: Final = "starting"
"""Phase that a training reports first in each attempt, before its turn to load has come."""
WARMING_UP: Final = "warming up"
"""Phase of a training whose process was started before its inputs are there."""
LOADING: Final = "loading"
"""Phase that a training reports once its turn has come."""


@dataclass(frozen=True)
class Limits:
    """How long a step may be silent, in seconds."""

    hang_seconds: float
    """Between two progress reports of a training that makes updates (the plan's `cluster.hang_minutes`)."""
    start_seconds: float = 600.0
    """Allowed beside `hang_seconds` until the first update of an attempt: the training loads and compiles."""
    waiting_seconds: float = 60.0
    """Between two messages about a step that waits for capacity."""


Phase: TypeAlias = Literal["queued", "preparing", "updating"]


@dataclass(frozen=True)
class StepState:
    """One step, as far as its progress reports tell."""

    heard_at: float
    """Time of the last report, or of submission; of being killed, so that a
    second kill waits as long again."""
    said_at: float
    """Time of the last message that it waits for capacity."""
    phase: Phase = "queued"
    """queued: not heard at work in this attempt; preparing: at work before its
    first update; updating: after it."""
    is_training: bool = False
    """Only trainings report regularly, so only they can be seen to hang."""
    waits_for: str = ""
    """Capacity that the cluster lacked at submission, such as "2 GPUs"; empty
    once the step is heard at work."""

    @classmethod
    def submitted(cls, now: float, is_training: bool = False, waits_for: str = "") -> "StepState":
        """State of a step that was just submitted."""
        return cls(now, now, is_training=is_training, waits_for=waits_for)


@dataclass(frozen=True)
class Say:
    """Tell the user that the step waits."""

    note: str


@dataclass(frozen=True)
class Kill:
    """Kill the step's processes and tell the user why; Ray restarts it from its last checkpoint."""

    note: str


Action: TypeAlias = Say | Kill | None


def supervise(
    state: StepState, news: Progress | None, now: float, limits: Limits
) -> tuple[StepState, Action]:
    """The state after `news`, the newest report since the last call if there
    is one, and the action to take."""
    if news is not None:
        phase = _phase_after(state, news)
        return replace(
            state, phase=phase, heard_at=now, waits_for=state.waits_for if phase == "queued" else ""
        ), None
    patience = _patience(state, limits)
    if state.is_training and state.phase != "queued" and now - state.heard_at >= patience:
        return replace(state, heard_at=now), Kill(f"without an update for {patience / 60:g} min, killed")
    if state.waits_for and now - state.said_at >= limits.waiting_seconds:
        return replace(state, said_at=now), Say(waiting_note(state.waits_for))
    return state, None


def waiting_note(capacity: str) -> str:
    """The reason for waiting, of a step that the cluster has no room for yet."""
    return f"for the cluster to grow to {capacity}"


def _phase_after(state: StepState, news: Progress) -> Phase:
    if news.phase == STARTING:
        return "queued"
    if news.phase == LOADING:  # its "starting" may have been overtaken between two calls
        return "preparing"
    if news.loss is not None or state.phase == "updating":
        return "updating"
    return "preparing"


def _patience(state: StepState, limits: Limits) -> float:
    """Seconds without a report after which a training counts as hanging."""
    return limits.hang_seconds + (0 if state.phase == "updating" else limits.start_seconds)
