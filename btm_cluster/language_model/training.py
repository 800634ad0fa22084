"""The train loop: from update n to update m on token blocks, in one process or in one process group.

It gets a specification, a state and callbacks, and changes the state in place. AdamW, gradient clipping, accumulation,
bf16 and torch.compile on a GPU. Block order and learning rate are functions of the update alone, so a training that was
killed continues at the exact update; on CPU, with the same threads, bit for bit. Knows no store, artifact, request or Ray.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from btm_cluster.errors import DivergedError, Stopped
from btm_cluster.language_model.batches import blocks_of_update, split_into_micro_batches
from btm_cluster.language_model.compute import autocast
from btm_cluster.language_model.demix_group import DemixGroup
from btm_cluster.language_model.loss import NextTokenLoss
from btm_cluster.language_model.model import has_dropout
from btm_cluster.language_model.optimizer import learning_rate_at
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState

REPORT_SECONDS = 1.0
AGREE_EVERY = 8
"""Updates between two agreements of a process group on whether to stop: each one waits for the device."""


@dataclass(frozen=True)
class UpdateReport:
    """How a training goes at the update that its state stands at."""

    loss: float
    """Mean negative log-likelihood per token of this rank's blocks, in nats."""
    tokens_per_second: float
    """All ranks together, since the last report."""


class TrainingCallbacks(Protocol):
    """Called at stated moments: by all ranks of a group at the same update, except `report`."""

    def should_stop(self) -> bool:
        """Before each update: whether to save and stop. One rank's yes stops the group, within AGREE_EVERY updates."""

    def should_save(self) -> bool:
        """Before an update, in a group every AGREE_EVERY-th: whether to save after it. All ranks must return the same."""

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
        self.device = spec.compute.device
        self.group = ProcessGroup.joined(self.device)
        self.demix: DemixGroup | None = None
        if state.share is not None and self.group.world > 1:
            self.demix = DemixGroup(state.model, state.share)
        self.has_dropout = has_dropout(state.model)
        self.forward = self._wrap(NextTokenLoss(state.model, spec.first_token))
        self.loss = torch.zeros((), device=self.device)
        self.pace = _Pace()

    def run(self) -> None:
        spec, state = self.spec, self.state
        state.model.train()
        while state.update < spec.last_update:
            must_save = self._stop_or_save()
            self.loss = self._one_update()
            state.update += 1
            self.pace.tokens += spec.tokens_per_update
            if self.pace.is_report_due() or state.update == spec.last_update:
                self._report()
            if must_save:
                self._save(wait=False)
            if state.update in spec.milestones:
                self._check_finite(weights=True)
                self.callbacks.passed_milestone(state)
        self._check_finite(weights=True)

    # One update

    def _one_update(self) -> torch.Tensor:
        """One optimiser step; returns this rank's mean loss per token, still on the device."""
        spec, optimizer = self.spec, self.state.optimizer
        self._seed_dropout()
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate_at(self.state.update, spec)
        blocks = self._blocks()
        micro_batches = split_into_micro_batches(blocks, spec.compute.micro_batch_blocks, self.state.share)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            with self._gradients_shared(after=i == len(micro_batches) - 1):
                with autocast(self.device, spec.compute.precision):
                    loss = self.forward(micro_batch)
                # DDP averages over ranks; the loss is a sum over all of them
                (loss * (self.group.world / spec.tokens_per_update)).backward()
            total += loss.detach()
        norm = self._clip_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A gradient that is not finite spoils the weights under a finite loss: it spoils the loss that is reported too.
        return total / blocks.numel() + 0.0 * norm

    def _seed_dropout(self) -> None:
        """Seeds dropout for each update anew, so that a resumed training draws the same."""
        if self.has_dropout:
            torch.manual_seed(hash((self.spec.training.random_seed, self.state.update, self.group.rank)) % 2**63)

    def _blocks(self) -> torch.Tensor:
        blocks = blocks_of_update(self.spec, self.state.update, self.group, self.state.share)
        if self.device.type == "cuda":
            return blocks.pin_memory().to(self.device, non_blocking=True)
        return blocks

    def _gradients_shared(self, after: bool) -> AbstractContextManager[Any]:
        """Context of a backward pass: ranks share gradients only after the last one of an update."""
        if after or self.group.world == 1:
            return nullcontext()
        no_sync: AbstractContextManager[Any] = self.forward.no_sync()  # type: ignore[operator]
        return no_sync

    def _clip_gradients(self) -> torch.Tensor:
        largest = self.spec.training.gradient_clip
        if self.demix is not None:
            return self.demix.clip_gradients(largest)
        return torch.nn.utils.clip_grad_norm_(self.state.model.parameters(), largest)

    # Between updates

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

    def _report(self) -> None:
        rate = self.pace.lap()
        if self.group.world == 1:
            self._check_finite()
        if self.group.is_first:
            self.callbacks.report(self.state, UpdateReport(self.loss.item(), rate))

    def _save(self, wait: bool) -> None:
        """Has the state saved, unless it is spoiled: the last good one stays."""
        if not self._is_spoiled(weights=True):
            self.callbacks.save(self.state, wait)

    def _check_finite(self, weights: bool = False) -> None:
        if self._is_spoiled(weights):
            raise DivergedError(
                f"{self.spec.label}: the loss or the weights are not finite at update {self.state.update}",
                found=f"loss {self.loss.item()}",
                remedy=self.spec.divergence_remedy,
            )

    def _is_spoiled(self, weights: bool) -> bool:
        """Whether the loss, or the weights where asked, are not finite on any rank: all ranks get the same answer."""
        spoiled = not math.isfinite(self.loss.item()) or (weights and not self.state.has_finite_weights())
        return any(self.group.any(spoiled))

    # Set-up

    def _wrap(self, loss: NextTokenLoss) -> torch.nn.Module:
        """Makes the loss data parallel, and compiled, where it is to be."""
        wrapped: torch.nn.Module = loss
        if self.demix is not None:
            self.demix.hide_from(loss)
        if self.group.world > 1:
            wrapped = DistributedDataParallel(loss, device_ids=[self.device] if self.device.type == "cuda" else None)
        if self.spec.compute.compile:
            wrapped.compile(dynamic=False, mode="reduce-overhead" if self._fits_a_graph() else None)
        return wrapped

    def _fits_a_graph(self) -> bool:
        """Whether an update can replay CUDA graphs: alone, and in one forward pass, since a second one would overwrite
        the gradients that the first left in the graph's memory. Small experts are bound by launches: twice as fast."""
        is_one_pass = self.spec.blocks_per_update <= self.spec.compute.micro_batch_blocks
        return self.device.type == "cuda" and self.group.world == 1 and is_one_pass
