"""The train loop: from update n to update m on token blocks, in one process or in one process group.

AdamW, gradient clipping, accumulation, bf16 and torch.compile on a GPU. Block order and learning rate are functions of
the update alone, so a run that was killed continues at the exact update; on CPU, in the same numerics profile, bit for bit.
Knows nothing of Ray: a process group, where there is one, was set up by the caller.
"""

import dataclasses
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from btm_cluster.errors import DivergedError, IntegrityError, MissingError, Stopped, StoreError
from btm_cluster.language_model.blocks import Blocks, block_order
from btm_cluster.language_model.checkpoint import TrainingCheckpoints, load_training, optimizer_tensors
from btm_cluster.language_model.demix import split_feed_forwards
from btm_cluster.language_model.demix_group import DemixGroup, share_of
from btm_cluster.language_model.model import build_model, check_reads, has_dropout, weights_of
from btm_cluster.language_model.optimizer import build_optimizer, learning_rate_at
from btm_cluster.language_model.resuming import AlreadyTrained, Source, earlier_spans, find_source, profiles
from btm_cluster.language_model.utilisation import device_name, utilisation
from btm_cluster.ledger import Ledger
from btm_cluster.requests import Resources, Role, TrainRequest
from btm_cluster.storage.node_cache import node_cache
from btm_cluster.workers import Control, Progress

log = logging.getLogger(__name__)
REPORT_SECONDS = 1.0
NOTICE_SECONDS = 5.0
"""Between two questions on whether this machine will be taken away."""
CAUSAL_TOKENS = 8
"""Enough to see whether a model reads from left to right."""
AGREE_EVERY = 8
"""Updates between two agreements of a process group on whether to stop: each one waits for the device."""


class NextTokenLoss(torch.nn.Module):
    """Summed negative log-likelihood of blocks [B, T], each read after the tokenizer's first token."""

    def __init__(self, model: PreTrainedModel, first_token: int) -> None:
        super().__init__()
        self.model = model
        self.first_token = first_token

    def forward(self, blocks_BT: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=read_after(blocks_BT, self.first_token), use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), blocks_BT.flatten(), reduction="sum")


def read_after(blocks_BT: torch.Tensor, first_token: int) -> torch.Tensor:
    """What a model reads to predict blocks [B, T]: the first token, then all tokens but the last."""
    first = torch.full_like(blocks_BT[:, :1], first_token)
    return torch.cat([first, blocks_BT[:, :-1]], dim=1)


def device_of(how: Resources) -> torch.device:
    """The device that the caller's resources mean."""
    return torch.device("cuda" if how.gpus_per_worker > 0 else "cpu")


def autocast(how: Resources) -> AbstractContextManager[Any]:
    """The forward pass's arithmetic."""
    if how.precision == "bfloat16":
        return torch.autocast(device_of(how).type, dtype=torch.bfloat16)
    return nullcontext()


@dataclass
class Trained:
    """What training ended in. `optimizer` continues where a branch keeps it."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    facts: dict[str, Any]
    note: dict[str, Any]


@dataclass
class _Pace:
    """Measured while running, for progress and for estimates; no result depends on it."""

    started: float = field(default_factory=time.monotonic)
    tokens: int = 0
    reported: float = field(default_factory=time.monotonic)
    reported_tokens: int = 0

    def is_due(self) -> bool:
        return time.monotonic() - self.reported >= REPORT_SECONDS

    def lap(self) -> float:
        """Tokens per second since the last lap."""
        now = time.monotonic()
        rate = (self.tokens - self.reported_tokens) / max(now - self.reported, 1e-9)
        self.reported, self.reported_tokens = now, self.tokens
        return rate


Passed = Callable[[TrainRequest, Trained], Any]
"""What is done at a milestone: given the request that ends there, and the training as it stands."""


def train(
    request: TrainRequest,
    ledger: Ledger,
    control: Control,
    texts: Sequence[Blocks],
    first_token: int,
    at_milestone: Passed,
) -> Trained:
    """Trains as `request` says, from its start, its last milestone or its last training checkpoint.

    Raises:
        Stopped: `control` asked to stop; the state was saved.
        DivergedError: the loss is not finite; the last training checkpoint is kept.
    """
    run = _TrainingRun(request, ledger, control, texts, first_token)
    return run.run(at_milestone)


class _TrainingRun:
    """The state of one training: model, optimiser, counter."""

    def __init__(
        self, request: TrainRequest, ledger: Ledger, control: Control, texts: Sequence[Blocks], first_token: int
    ) -> None:
        self.request, self.ledger, self.control, self.texts = request, ledger, control, texts
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = device_of(request.how)
        if self.device.type == "cpu":
            torch.set_num_threads(request.how.cpus_per_worker)
        else:
            torch.set_float32_matmul_precision("high")
        self.share = share_of(self.rank, self.world, len(request.texts)) if request.is_demix else None
        self._build()
        self.has_dropout = has_dropout(self.model)
        self.passed_over: set[str] = set()
        """Manifest hashes of training checkpoints that could not be loaded."""
        self.source = self._restore()
        self.update = self.source.update
        self.group = DemixGroup(self.model, self.share) if self.share is not None and self.world > 1 else None
        self.forward = self._wrap(NextTokenLoss(self.model, first_token))
        self.checkpoints = TrainingCheckpoints(ledger, request.ref.identity, request.label, self.passed_over)
        self.last_saved = time.monotonic()
        self.noticed = False
        self.next_question = time.monotonic()
        self.pace = _Pace()
        self.loss = torch.zeros((), device=self.device)

    def run(self, at_milestone: Passed) -> Trained:
        self.model.train()
        try:
            while self.update < self.request.last_update:
                must_save = self._stop_or_save()
                self.loss = self._one_update()
                self.update += 1
                self.pace.tokens += self.request.blocks_per_update * self.request.training.block_tokens
                if self.pace.is_due() or self.update == self.request.last_update:
                    self._report()
                if must_save:
                    self._save(wait=False)
                    self.last_saved = time.monotonic()
                if self.update in self.request.milestones:
                    self._check_finite(weights=True)
                    if self.rank == 0:
                        passed = self.request.until(self.update)
                        at_milestone(passed, self._trained(passed.role))
            self._check_finite(weights=True)
            if self.request.is_demix:  # its parts are stored one by one, and all must come from one state
                self._save(wait=True)
        finally:
            self.checkpoints.close()
        return self._trained(self.request.role)

    def _trained(self, role: str) -> Trained:
        return Trained(self.model, self.optimizer, self._facts(role), self._note())

    def _build(self) -> None:
        """A model with its first weights, and an optimiser that has made no step."""
        model = build_model(self.request.model, self.request.training.random_seed)
        if self.request.start is None:
            check_reads(model, CAUSAL_TOKENS, f"a {self.request.model['model_type']}")
        if self.share is not None:
            split_feed_forwards(model, self.share.domains)
        self.model = model.to(self.device)
        self.optimizer = build_optimizer(self.model, self.request)

    def _restore(self) -> Source:
        """Loads the last training checkpoint that can be read, the last milestone, or the start.

        All ranks of a group load the same, or all pass it over. A checkpoint may be dropped by another driver while it is
        read here: then there is a newer one, or the model.
        """
        while True:
            source = self._agree_on_source()
            trouble = self._load(source)
            if not any(self._any(trouble is not None)):
                return source
            assert source.stored is not None
            self.passed_over.add(source.stored.manifest_hash)
            self._build()  # a part of it may have been loaded

    def _agree_on_source(self) -> Source:
        """What the first rank finds."""
        agreed: list[Any] = [None]
        if self.rank == 0:
            try:
                agreed = [find_source(self.request, self.ledger, self.passed_over)]
            except AlreadyTrained as exc:
                agreed = [exc]
        if self.world > 1:
            dist.broadcast_object_list(agreed, src=0, device=self.device)
        if isinstance(agreed[0], AlreadyTrained):
            raise agreed[0]
        source: Source = agreed[0]
        return source

    def _load(self, source: Source) -> StoreError | None:
        """What is wrong with a training checkpoint, if it cannot be read; it was made here, and can be made again."""
        if source.stored is None:
            return None
        try:
            load_training(self.model, self.optimizer, self.ledger, source.stored, source.keep_optimizer)
        except (IntegrityError, MissingError) as exc:
            if not source.is_checkpoint:
                raise
            words = "%s: passed over, its training checkpoint is damaged (update %d): %s"
            log.warning(words, self.request.label, source.update, exc)
            return exc
        return None

    def _wrap(self, loss: NextTokenLoss) -> torch.nn.Module:
        wrapped: torch.nn.Module = loss
        if self.group is not None:
            self.group.hide_from(loss)
        if self.world > 1:
            wrapped = DistributedDataParallel(loss, device_ids=[self.device] if self.device.type == "cuda" else None)
        if self.request.how.compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(node_cache().folder_for_code()))
            wrapped.compile(dynamic=False, mode="reduce-overhead" if self._fits_a_graph() else None)
        return wrapped

    def _fits_a_graph(self) -> bool:
        """Whether an update can replay CUDA graphs: alone, and in one forward pass, since a second one would overwrite
        the gradients that the first left in the graph's memory. Small experts are bound by launches: twice as fast."""
        blocks = self.request.blocks_per_update
        return self.device.type == "cuda" and self.world == 1 and blocks <= self.request.how.micro_batch_blocks

    def _one_update(self) -> torch.Tensor:
        """One optimiser step; returns this rank's mean loss per token, still on the device."""
        if self.has_dropout:  # drawn anew for each update, so that a resumed run draws the same
            torch.manual_seed(hash((self.request.training.random_seed, self.update, self.rank)) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.update, self.request)
        blocks = self._blocks_of(self.update)
        tokens = self.request.blocks_per_update * self.request.training.block_tokens
        micro_batches = self._micro_batches(blocks)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            is_last = i == len(micro_batches) - 1
            no_sync = nullcontext() if is_last or self.world == 1 else self.forward.no_sync()  # type: ignore[operator]
            with no_sync:
                with autocast(self.request.how):
                    loss = self.forward(micro_batch)
                (loss * (self.world / tokens)).backward()  # DDP averages over ranks; the loss is a sum over all of them
            total += loss.detach()
        norm = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A gradient that is not finite spoils the weights under a finite loss: it spoils the loss that is reported too.
        return total / blocks.numel() + 0.0 * norm

    def _clip_gradients(self) -> torch.Tensor:
        largest = self.request.training.gradient_clip
        if self.group is not None:
            return self.group.clip_gradients(largest)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest)

    def _micro_batches(self, blocks: torch.Tensor) -> Sequence[torch.Tensor]:
        """What goes through the model at once: of a DEMix, which routes blocks by their place, equally many of each domain."""
        at_once = self.request.how.micro_batch_blocks
        if self.share is None:
            return torch.split(blocks, at_once)
        domains = len(self.share.domains)
        by_domain = torch.split(blocks.view(domains, -1, blocks.shape[-1]), max(1, at_once // domains), dim=1)
        return [part.flatten(0, 1) for part in by_domain]

    def _blocks_of(self, update: int) -> torch.Tensor:
        """This rank's blocks of an update, int64 [blocks, block_tokens], equally many of each text over all ranks.

        Of a DEMix, those of the rank's own domains.
        """
        request = self.request
        count = request.training.blocks_per_domain_update
        position = (update - request.first_update if request.restart_data else update) * count
        # An expert's order must not repeat the seed's: it would see the same blocks first, twice.
        seed = request.training.random_seed + (1 if request.restart_data else 0)
        orders = [
            (blocks, block_order(seed, text.identity, len(blocks), position, count))
            for text, blocks in zip(request.texts, self.texts, strict=True)
        ]
        if self.share is None:
            # Every world-th of all texts' rows together, of which only these are read.
            firsts = [(self.rank - i * count) % self.world for i in range(len(orders))]
            rows = np.concatenate(
                [blocks.take(order[first :: self.world]) for (blocks, order), first in zip(orders, firsts, strict=True)]
            )
        else:
            own = slice(self.share.number, None, self.share.ranks_per_domain)
            rows = np.concatenate([orders[d][0].take(orders[d][1][own]) for d in self.share.domains])
        mine = torch.from_numpy(rows)
        if self.device.type == "cuda":
            return mine.pin_memory().to(self.device, non_blocking=True)
        return mine

    def _stop_or_save(self) -> bool:
        """Saves and raises where the driver asked to stop; whether to save after this update: because it is time, or, once,
        because this machine will be taken away.

        In a group all ranks agree at the same update: who left alone would leave the others waiting.
        """
        now = time.monotonic()
        stop, ask = self.control.stopping(), not self.noticed and now >= self.next_question
        is_time = now - self.last_saved >= self.request.checkpoint_seconds
        if self.world > 1:
            if self.update % AGREE_EVERY:
                return False
            self._check_finite()
            stop, ask, is_time = self._any(stop, ask, is_time)
        if stop:
            self._check_finite(weights=True)
            self._save(wait=True)
            raise Stopped(f"{self.request.label} was stopped", found=f"saved at update {self.update}")
        if not ask:
            return is_time
        self.next_question = now + NOTICE_SECONDS
        (self.noticed,) = self._any(self.control.saving())
        return is_time or self.noticed

    def _any(self, *flags: bool) -> list[bool]:
        """Each flag: whether it is up on any rank of the group."""
        if self.world == 1:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def _check_finite(self, weights: bool = False) -> None:
        """Raises on all ranks, or on none, since a rank that left alone would leave the others waiting for it."""
        spoiled = not math.isfinite(self.loss.item()) or (weights and not self._has_finite_weights())
        if any(self._any(spoiled)):
            raise DivergedError(
                f"{self.request.label}: the loss or the weights are not finite at update {self.update}",
                found=f"loss {self.loss.item()}",
                remedy=_calmer_recipe(self.request.role),
            )

    def _has_finite_weights(self) -> bool:
        return bool(torch.stack([parameter.isfinite().all() for parameter in weights_of(self.model).values()]).all())

    def _report(self) -> None:
        rate = self.pace.lap()
        if self.world == 1:
            self._check_finite()
        if self.rank == 0:
            request = self.request
            tokens_left = (
                (request.last_update - self.update) * request.blocks_per_update * request.training.block_tokens
            )
            span = (self.update, request.first_update, request.last_update)
            pace = (rate, tokens_left / max(rate, 1e-9))
            stored = (self.checkpoints.stall_seconds, self.checkpoints.upload_seconds)
            block_tokens, device = request.training.block_tokens, device_name(self.device)
            mfu = utilisation(self.model, request.how, block_tokens, rate, device)
            self.control.report(Progress(request.label, "training", *span, self.loss.item(), *pace, *stored, mfu))

    def _save(self, wait: bool) -> None:
        """All ranks of a group come here at the same update."""
        spoiled = not (math.isfinite(self.loss.item()) and self._has_finite_weights())
        if any(self._any(spoiled)):
            return  # the last good checkpoint stays
        state = weights_of(self.model), optimizer_tensors(self.model, self.optimizer)
        weights, moments = (tensors.items() if self.group is None else self.group.gather(tensors) for tensors in state)
        if self.rank == 0:
            facts = {"how": dataclasses.asdict(self.request.how), "model": self.request.recipe} | self._profiles()
            self.checkpoints.save(self.update, weights, moments, facts, wait)
        elif self.group is not None:
            deque(chain(weights, moments), maxlen=0)  # the first rank gathers what this one holds

    def _facts(self, role: str) -> dict[str, Any]:
        request = self.request
        passed = [request.until(update).ref.identity for update in request.milestones if update < self.update]
        tokens = (self.update - request.first_update) * request.blocks_per_update * request.training.block_tokens
        return {"role": role, "tokens": tokens, **self._profiles(), "passed": passed}

    def _profiles(self) -> dict[str, Any]:
        earlier = earlier_spans(self.source, self.request.first_update)
        return profiles(earlier, self.source.update, self.request.how, self.update)

    def _note(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.pace.started
        gpus = self.request.how.workers * self.request.how.gpus_per_worker
        return {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.pace.tokens / max(seconds, 1e-9), 1),
            "gpus": gpus,
            "device": device_name(self.device),
            "checkpoint_stall_seconds": round(self.checkpoints.stalled_seconds, 3),
        }


def _calmer_recipe(role: Role) -> str:
    """What can be changed against divergence. Of what a seed was trained by, nothing any more once it stands."""
    if role == "expert":
        return "lower `branching.learning_rate_scale`"
    return (
        "lower `training.learning_rate` or `training.gradient_clip`, where a forest stands already in another `store`"
    )
