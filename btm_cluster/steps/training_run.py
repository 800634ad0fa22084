"""One run of the train loop for a request: goes on from what the store has, and saves and reports on the way.

Here the loop's callbacks meet store and driver. Committing what comes out is the caller's.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from btm_cluster.curve import Curve
from btm_cluster.language_model.compute import Compute, device_name, device_of
from btm_cluster.language_model.deltas import FILES
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training import UpdateReport, train
from btm_cluster.language_model.training_spec import TextBlocks, TrainingSpec
from btm_cluster.language_model.training_state import TrainingState
from btm_cluster.language_model.utilisation import utilisation
from btm_cluster.ledger import Ledger
from btm_cluster.requests import Resources, Role, TrainRequest
from btm_cluster.requests.progress import Control, Progress
from btm_cluster.steps.checkpoints import TrainingCheckpoints
from btm_cluster.steps.compiled_code import keep_compiled_code
from btm_cluster.steps.development import open_development
from btm_cluster.steps.resuming import Source, earlier_spans, measured_before, profiles, restore
from btm_cluster.steps.settling import settled

log = logging.getLogger(__name__)
NOTICE_SECONDS = 5.0
"""Between two questions on whether this machine will be taken away."""


@dataclass(frozen=True)
class Trained:
    """A training as it stands at its end or at a milestone, with what an artifact's manifest says of it."""

    state: TrainingState
    facts: dict[str, Any]
    note: dict[str, Any]
    curve: Curve


AtMilestone: TypeAlias = Callable[[TrainRequest, Trained], Any]
"""Called on all ranks at a milestone or a snapshot, with the request that ends there."""


def run_training(
    request: TrainRequest,
    ledger: Ledger,
    control: Control,
    texts: Sequence[TextBlocks],
    first_token: int,
    at_milestone: AtMilestone,
    trace_file: Path | None = None,
) -> Trained:
    """Trains as `request` says, from its start, its last milestone or its last training checkpoint. A profiler's
    trace of a few updates of the first rank goes to `trace_file`.

    Raises:
        AlreadyTrained: another driver has committed the model meanwhile.
        Stopped: `control` asked to stop; the state was saved.
        DivergedError: the loss is not finite; the last training checkpoint is kept.
    """
    group = ProcessGroup.joined(device_of(request.how.gpus_per_worker))
    request = settled(request, group)
    spec = spec_of(request, texts, first_token)
    set_up(spec.compute)
    own_trace = trace_file if group.is_first else None
    development = open_development(request, ledger, group)
    spec = replace(spec, development_DNT=development, trace_file=own_trace)
    state, source, passed_over = restore(request, spec, ledger, group)
    weights_file = FILES[request.trains.part]
    checkpoints = TrainingCheckpoints(ledger, request, request.label, passed_over, weights_file)
    run = TrainingRun(request, spec, control, group, source, checkpoints, at_milestone)
    try:
        train(spec, state, run)
        if request.is_demix:  # its parts are stored one by one, and all must come from one state
            run.save(state, wait=True)
    finally:
        checkpoints.close()
    trained = run.trained(request.role, state)
    if group.is_first and (rise := trained.curve.rise()):
        log.warning("%s: its %s; a calmer recipe: %s", request.label, rise.sentence, spec.divergence_remedy)
    return trained


def set_up(compute: Compute) -> None:
    """Sets torch's settings of this process; to be called before a model is built."""
    compute.set_up()
    if compute.compile:
        keep_compiled_code()


def spec_of(request: TrainRequest, texts: Sequence[TextBlocks], first_token: int) -> TrainingSpec:
    """Specification of a request's training for the train loop; `texts` are its texts, opened."""
    return TrainingSpec(
        label=request.label,
        model=request.model,
        texts=tuple(texts),
        first_token=first_token,
        training=request.training,
        first_update=request.first_update,
        last_update=request.last_update,
        milestones=tuple(sorted({*request.milestones, *request.snapshots})),
        from_scratch=request.start is None,
        rewarms=request.start is not None and not request.start.keep_optimizer,
        restart_data=request.restart_data,
        is_demix=request.is_demix,
        compute=compute_of(request.how),
        trains=request.trains,
        divergence_remedy=_calmer_recipe(request.role),
    )


def compute_of(how: Resources) -> Compute:
    """Settings of each process of a training."""
    assert how.micro_batch_blocks != "auto", "settled before"
    return Compute(
        device=device_of(how.gpus_per_worker),
        threads=how.cpus_per_worker,
        micro_batch_blocks=how.micro_batch_blocks,
        precision=how.precision,
        compile=how.compile,
        is_sharded=how.sharding == "full" and how.workers > 1,
        recomputes=how.activation_checkpointing == "on",
    )


def _calmer_recipe(role: Role) -> str:
    """Advice against divergence; once a seed stands, nothing that it was trained by."""
    if role == "expert":
        return "lower `branching.learning_rate_scale`"
    return "lower `training.learning_rate` or `training.gradient_clip`, where a forest stands already in another `store`"


class TrainingRun:
    """The train loop's callbacks (`TrainingCallbacks`) for one request."""

    def __init__(
        self,
        request: TrainRequest,
        spec: TrainingSpec,
        control: Control,
        group: ProcessGroup,
        source: Source,
        checkpoints: TrainingCheckpoints,
        at_milestone: AtMilestone,
    ) -> None:
        self._request, self._spec, self._control, self._group = request, spec, control, group
        self._source, self._checkpoints, self._at_milestone = source, checkpoints, at_milestone
        self._started = self._last_saved = self._next_question = time.monotonic()
        self._first_report: tuple[int, float] | None = None
        """The update of the first report, and when it was made."""
        self._is_warned = False
        """Whether this machine is known to be taken away: that is heard, and answered by a save, once."""

    def should_stop(self) -> bool:
        return self._control.stopping()

    def should_save(self) -> bool:
        """Whether it is time, or, once, this machine will be taken away; any rank's yes holds for all."""
        now = time.monotonic()
        is_time = now - self._last_saved >= self._request.checkpoint_seconds
        is_time, ask = self._group.any(is_time, not self._is_warned and now >= self._next_question)
        if not ask:
            return is_time
        self._next_question = now + NOTICE_SECONDS
        (self._is_warned,) = self._group.any(self._control.saving())
        return is_time or self._is_warned

    def save(self, state: TrainingState, wait: bool) -> None:
        weights, moments = state.weights(), state.moments()
        if self._group.is_first:
            facts = {"how": self._request.how.facts, **self._request.trains.facts} | self._profiles(state)
            self._checkpoints.save(state.update, weights, moments, state.recording.curve(), facts, wait)
        else:
            deque(chain(weights, moments), maxlen=0)  # the first rank gathers what this one holds
        self._last_saved = time.monotonic()

    def passed_milestone(self, state: TrainingState) -> None:
        for passed in self._request.passing(state.update):
            self._at_milestone(passed, self.trained(passed.role, state))

    def _seconds_left(self, update: int) -> float | None:
        """By the pace since the first report, which is of an update that warmed up: None until there is another.
        The pace since the last one goes up and down with all else that the machine does."""
        now, left = time.monotonic(), self._request.last_update - update
        self._first_report = self._first_report or (update, now)
        first, began = self._first_report
        return left * (now - began) / (update - first) if update > first else None

    def report(self, state: TrainingState, report: UpdateReport) -> None:
        request, rate = self._request, report.tokens_per_second
        device = device_name(self._spec.compute.device)
        mfu = utilisation(state.model, request.how, request.training.block_tokens, rate, device)
        development = report.development or (None, None)
        self._control.report(
            Progress(
                request.label,
                "training",
                state.update,
                request.last_update,
                "updates",
                first=self._source.update,
                loss=report.loss,
                tokens_per_second=rate,
                seconds_left=self._seconds_left(state.update),
                stall_seconds=self._checkpoints.stall_seconds,
                upload_seconds=self._checkpoints.upload_seconds,
                mfu=mfu,
                learning_rate=report.learning_rate,
                gradient_norm=report.gradient_norm,
                tokens=self._tokens(state),
                development_update=development[0],
                development_loss=development[1],
            )
        )

    def trained(self, role: Role, state: TrainingState) -> Trained:
        """The training as it stands, for an artifact of `role`."""
        request, curve = self._request, state.recording.curve()
        training = request.training
        size = (training.updates, training.blocks_per_domain_update)
        curve = curve.ending_at(state.update, request.first_update, *size)
        return Trained(state, self._facts(role, state), self._note(state), curve)

    def _facts(self, role: Role, state: TrainingState) -> dict[str, Any]:
        trained = {"tokens": self._tokens(state), **self._request.trains.facts}
        return {"role": role, **trained, **self._profiles(state)}

    def _tokens(self, state: TrainingState) -> int:
        return (state.update - self._request.first_update) * self._spec.tokens_per_update

    def _profiles(self, state: TrainingState) -> dict[str, Any]:
        earlier = earlier_spans(self._source, self._request.first_update)
        return profiles(earlier, self._source.update, self._request.how, state.update)

    def _note(self, state: TrainingState) -> dict[str, Any]:
        gpus = self._request.how.workers * self._request.how.gpus_per_worker
        tokens, seconds = measured_before(self._source, self._request, gpus)
        seconds += time.monotonic() - self._started
        tokens += (state.update - self._source.update) * self._spec.tokens_per_update
        return {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "gpus": gpus,
            "device": device_name(self._spec.compute.device),
            "checkpoint_stall_seconds": round(self._checkpoints.stalled_seconds, 3),
        }
