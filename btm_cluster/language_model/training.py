"""The train loop: from update n to update m on token blocks, in one process or in one process group.

It gets a specification, a state and callbacks, and changes the state in place. AdamW, gradient clipping,
accumulation, bf16 and torch.compile on a GPU. Block order and learning rate are functions of the update
alone, so a training that was killed continues at the exact update; on CPU, with the same threads, bit for
bit. Knows no store, artifact, request or Ray.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Protocol

from btm_cluster.curve import is_recorded
from btm_cluster.errors import DivergedError, Stopped
from btm_cluster.language_model.development import DevelopmentLoss
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.tracing import Trace
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState
from btm_cluster.language_model.update import Update, Updates

REPORT_SECONDS = 1.0
AGREE_EVERY = 8
"""Updates between two agreements of a process group on whether to stop: each one waits for the device."""


@dataclass(frozen=True)
class UpdateReport:
    """How a training goes: at the update that its state stands at, or on a GPU, while more is to come, at the one
    before it, so that the device always has something to do."""

    loss: float
    """Mean negative log-likelihood per token of this rank's blocks, in nats."""
    learning_rate: float
    gradient_norm: float
    """Over the whole model, before clipping."""
    tokens_per_second: float
    """All ranks together, since the last report."""
    development: tuple[int, float] | None = None
    """The update at which the newest loss on development blocks was taken, and that loss."""


class TrainingCallbacks(Protocol):
    """Called at stated moments: by all ranks of a group at the same update, except `report`."""

    def should_stop(self) -> bool:
        """Before each update: whether to save and stop.

        One rank's yes stops the group, within AGREE_EVERY updates.
        """

    def should_save(self) -> bool:
        """Before an update, in a group every AGREE_EVERY-th: whether to save after it.

        All ranks must return the same.
        """

    def save(self, state: TrainingState, wait: bool) -> None:
        """Between updates, with finite weights: save `state`. With `wait`, return once it is stored."""

    def passed_milestone(self, state: TrainingState) -> None:
        """After an update that is one of `spec.milestones`, with finite weights."""

    def report(self, state: TrainingState, report: UpdateReport) -> None:
        """About once a second, and after the last update, on the first rank alone."""


def train(spec: TrainingSpec, state: TrainingState, callbacks: TrainingCallbacks) -> None:
    """Trains `state` from the update that it stands at to `spec.last_update`.

    Raises:
        Stopped: a callback asked to stop; the state was saved.
        DivergedError: the loss or the weights are not finite; the last saved state is good.
    """
    _TrainLoop(spec, state, callbacks).run()


@dataclass
class _Pace:
    """Tokens per second, measured for reports; no result depends on it."""

    tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def is_report_due(self) -> bool:
        return time.monotonic() - self.since >= REPORT_SECONDS

    def lap(self) -> float:
        """Tokens per second since the last lap."""
        now = time.monotonic()
        rate = self.tokens / max(now - self.since, 1e-9)
        self.tokens, self.since = 0, now
        return rate


class _TrainLoop:
    """One training on one rank."""

    def __init__(self, spec: TrainingSpec, state: TrainingState, callbacks: TrainingCallbacks) -> None:
        self.spec, self.state, self.callbacks = spec, state, callbacks
        self.group = ProcessGroup.joined(spec.compute.device)
        self.updates = Updates(spec, state, self.group)
        self.development = DevelopmentLoss(spec, state, self.group)
        self.made: Update | None = None
        self.before: Update | None = None
        self.pace = _Pace()

    def run(self) -> None:
        trace = Trace(
            self.spec.trace_file, self.spec.compute.device, self.spec.last_update - self.state.update
        )
        try:
            self._run(trace)
            trace.write()
        finally:
            trace.give_up()

    def _run(self, trace: Trace) -> None:
        spec, state = self.spec, self.state
        if any(self.group.any(not state.recording.curve().development.updates)):
            self._look_at_development()
        while state.update < spec.last_update:
            must_save = self._stop_or_save()
            trace.update_begins()
            self.before, self.made = self.made, self.updates.make()
            state.update += 1
            self.pace.tokens += spec.tokens_per_update
            self._record(self.made)
            self._look_at_development()
            if self.pace.is_report_due() or state.update == spec.last_update:
                self._report()
            if must_save:
                self._save(wait=False)
            if state.update in spec.milestones:
                self._check_finite(weights=True)
                self.callbacks.passed_milestone(state)
        self._check_finite(weights=True)

    def _stop_or_save(self) -> bool:
        """Saves and raises where a callback asked to stop; returns whether to save after this update.

        In a group all ranks agree at the same update: who left alone would leave the others waiting.
        """
        stop = self.callbacks.should_stop()
        if self.group.world > 1:
            if self.state.update % AGREE_EVERY:
                return False
            self._check_finite()
            (stop,) = self.group.any(stop)
        if stop:
            self._check_finite(weights=True)
            self._save(wait=True)
            raise Stopped(f"{self.spec.label} was stopped", found=f"saved at update {self.state.update}")
        return self.callbacks.should_save()

    def _record(self, made: Update) -> None:
        """Notes a point of the curve, where it has one: the loss is the mean over all ranks."""
        spec, update = self.spec, self.state.update
        if is_recorded(update, spec.training.updates, spec.ends):
            loss = self.group.sum(made.total_loss) / made.predicted
            tokens = (update - spec.first_update) * spec.tokens_per_update
            self.state.recording.note(update, tokens, made.learning_rate, loss, made.gradient_norm)

    def _look_at_development(self) -> None:
        if self.development.is_due(self.state.update):
            self.state.recording.note_development(self.state.update, self.development.take())

    def _report(self) -> None:
        shown = self._shown()
        loss, norm = shown.shown.read().tolist()
        rate = self.pace.lap()
        if self.group.world == 1 and not math.isfinite(loss):
            self._check_finite()
        if self.group.is_first:
            look = self.state.recording.newest_development()
            self.callbacks.report(self.state, UpdateReport(loss, shown.learning_rate, norm, rate, look))

    def _shown(self) -> Update:
        """The update that a report is of."""
        assert self.made is not None, "reports follow updates"
        is_last = self.state.update == self.spec.last_update
        if self.before is None or is_last or self.spec.compute.device.type == "cpu":
            return self.made
        return self.before

    def _save(self, wait: bool) -> None:
        """Has the state saved, unless it is spoiled: the last good one stays."""
        if not self._is_spoiled(weights=True):
            self.callbacks.save(self.state, wait)

    def _check_finite(self, weights: bool = False) -> None:
        if self._is_spoiled(weights):
            raise DivergedError(
                f"{self.spec.label}: the loss or the weights are not finite at update {self.state.update}",
                found=f"loss {self._loss()}",
                remedy=self.spec.divergence_remedy,
            )

    def _is_spoiled(self, weights: bool) -> bool:
        """Whether the loss, or the weights where asked, are not finite on any
        rank: all ranks get the same answer."""
        spoiled = not math.isfinite(self._loss()) or (weights and not self.state.has_finite_weights())
        return any(self.group.any(spoiled))

    def _loss(self) -> float:
        """This rank's loss at the last update of this run; waits for the device."""
        return 0.0 if self.made is None else float(self.made.shown.read()[0])
