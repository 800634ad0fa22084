"""One update of a training, on one rank: its blocks, forward and backward
passes, clipping and the optimiser's step."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from btm_cluster.language_model.activations import quicken_gelu
from btm_cluster.language_model.attention import leave_causal_masks_out
from btm_cluster.language_model.attention_kernels import kernels_for
from btm_cluster.language_model.batches import blocks_of_update, split_into_micro_batches
from btm_cluster.language_model.demix_group import DemixGroup
from btm_cluster.language_model.layers import (
    compile_layers,
    hand_on_in_bfloat16,
    layers_of,
    recompute_activations,
)
from btm_cluster.language_model.loss import (
    FILLER,
    NextTokenLoss,
    head_for,
    predicted_tokens,
    read_after,
    read_tokens,
)
from btm_cluster.language_model.memory import is_compiled_whole
from btm_cluster.language_model.model import has_dropout
from btm_cluster.language_model.on_host import OnHost
from btm_cluster.language_model.optimizer import learning_rate_at
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.sharding import clip_gradients
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState

TWO_PASS_SOFTMAX: dict[str, Any] = {"online_softmax": False}
"""An option of torch.compile. A softmax in one pass over the logits rescales its sum at every step; reading them twice
takes less: 1.7 ms instead of 2.2 for 32,768 tokens of a vocabulary of 50,304, on an H200."""

PASSES_UNTIL_RECORDED = 3
"""After so many passes torch.compile has recorded its CUDA graphs."""


@dataclass(frozen=True)
class Update:
    """Loss, gradient norm and learning rate of an update; tensors may still be computed on the device."""

    shown: OnHost
    """[2]: mean negative log-likelihood per predicted token of this rank's blocks, which is not finite where the
    gradient is not; and the gradient norm."""
    total_loss: torch.Tensor
    """Summed negative log-likelihood of this rank's blocks."""
    gradient_norm: torch.Tensor
    """Over the whole model, before clipping."""
    learning_rate: float
    predicted: torch.Tensor | int
    """Tokens that all ranks together predicted."""


class Updates:
    """Makes the updates of one training."""

    def __init__(self, spec: TrainingSpec, state: TrainingState, group: ProcessGroup) -> None:
        self.spec, self.state, self.group = spec, state, group
        self.device = spec.compute.device
        self.demix: DemixGroup | None = None
        if state.share is not None and group.world > 1:
            self.demix = DemixGroup(state.model, state.share)
        self.has_dropout = has_dropout(state.model)
        with spec.compute.arithmetic():
            self.head = head_for(state.model, spec.training.block_tokens)
        compute = spec.compute
        self.kernels = kernels_for(state.model, spec.training.block_tokens, compute.precision, compute.device)
        self.forward = self._wrap(NextTokenLoss(state.model, self.head))
        state.model.train()

    def make(self) -> Update:
        """One optimiser step."""
        self._seed_dropout()
        learning_rate = learning_rate_at(self.state.update, self.spec)
        blocks = self._blocks()
        own, predicted = self._count_predicted(blocks)
        total = self._backward(blocks, predicted)
        norm = self._clip_gradients()
        self.state.optimizer.step(learning_rate)
        # A gradient that is not finite spoils the weights under a finite loss: it spoils the loss that is
        # reported too.
        shown = OnHost(torch.stack([total / own + 0.0 * norm, norm]))
        return Update(shown, total, norm, learning_rate, predicted)

    def try_out(self) -> None:
        """The forward and backward passes of an update of made-up blocks: what these
        need is loaded and compiled afterwards.

        The state stays as it was.
        """
        shape = (self.spec.blocks_per_update // self.group.world, self.spec.training.block_tokens)
        blocks = torch.zeros(shape, dtype=torch.int64, device=self.device)
        for _ in range(PASSES_UNTIL_RECORDED):
            self._backward(blocks, self.spec.tokens_per_update)
            self._clip_gradients()
            self.state.optimizer.drop_gradients()

    def _count_predicted(self, blocks: torch.Tensor) -> tuple[torch.Tensor | int, torch.Tensor | int]:
        """Tokens that this rank predicts, and all ranks together; at least one, where nothing is."""
        if self.spec.predicts_all:
            return blocks.numel(), self.spec.tokens_per_update
        own = (blocks >= 0).sum()
        return own.clamp(min=1), self.group.sum(own).clamp(min=1)

    def _backward(self, blocks: torch.Tensor, predicted: torch.Tensor | int) -> torch.Tensor:
        """Adds the gradients of the mean loss per predicted token; returns the summed loss of this rank's
        blocks."""
        spec = self.spec
        micro_batches = self._micro_batches(blocks)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            # What is computed again in the backward pass needs the kernels that computed it first.
            with self._gradients_shared(after=i == len(micro_batches) - 1), self.kernels():
                read = targets = micro_batch
                if not spec.predicts_all or spec.compute.is_sharded:
                    read, targets = read_tokens(micro_batch), predicted_tokens(micro_batch)
                with spec.compute.arithmetic():
                    loss = self.forward(read_after(read, spec.first_token), targets)
                # Gradients are averaged over ranks; the loss is a sum over all of them.
                (loss * (self.group.world / predicted)).backward()
            total += loss.detach()
        return total

    def _micro_batches(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """A rank's blocks in forward passes. A sharded model's are collectives: a rank with fewer blocks than
        another fills its passes up by blocks of which nothing is predicted."""
        at_once = self.spec.compute.micro_batch_blocks
        micro_batches = list(split_into_micro_batches(blocks, at_once, self.state.share))
        if self.spec.compute.is_sharded:
            most = math.ceil(self.spec.blocks_per_update / self.group.world)
            lacking = math.ceil(most / at_once) - len(micro_batches)
            micro_batches += [torch.full_like(blocks[:1], FILLER)] * lacking
        return micro_batches

    def _seed_dropout(self) -> None:
        """Seeds dropout for each update anew, so that a resumed training draws the same."""
        if self.has_dropout:
            torch.manual_seed(
                hash((self.spec.training.random_seed, self.state.update, self.group.rank)) % 2**63
            )

    def _blocks(self) -> torch.Tensor:
        blocks = blocks_of_update(self.spec, self.state.update, self.group, self.state.share)
        if self.device.type == "cuda":
            return blocks.pin_memory().to(self.device, non_blocking=True)
        return blocks

    def _gradients_shared(self, after: bool) -> AbstractContextManager[Any]:
        """Context of a backward pass: ranks share gradients only after the last one of an update.

        Sharded, they do after each: whole gradients would be kept meanwhile.
        """
        if after or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        no_sync: AbstractContextManager[Any] = self.forward.no_sync()
        return no_sync

    def _clip_gradients(self) -> torch.Tensor:
        largest = self.spec.training.gradient_clip
        if self.demix is not None:
            return self.demix.clip_gradients(largest)
        return clip_gradients(self.state.model.parameters(), largest)

    def _wrap(self, loss: NextTokenLoss) -> torch.nn.Module:
        """Makes the loss data parallel, recomputed and compiled, where it is to be."""
        wrapped: torch.nn.Module = loss
        compute, model = self.spec.compute, self.state.model
        if compute.recomputes:
            recompute_activations(model)
        if compute.compile:
            leave_causal_masks_out(model)
            quicken_gelu(model)
            if not self._is_one_graph():
                compile_layers(model)
                loss.loss_of = torch.compile(loss.loss_of, dynamic=False, options=TWO_PASS_SOFTMAX)
        if compute.precision == "bfloat16" and not compute.is_sharded:
            hand_on_in_bfloat16(model)
        if self.demix is not None:
            self.demix.hide_from(loss)
        if self.group.world > 1 and not compute.is_sharded:
            wrapped = DistributedDataParallel(
                loss, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        if compute.compile and self._is_one_graph():
            with_graphs = {"triton.cudagraphs": self._fits_a_graph()}
            wrapped.compile(dynamic=False, options={**TWO_PASS_SOFTMAX, **with_graphs})
        return wrapped

    def _is_one_graph(self) -> bool:
        """Whether the model is compiled with its loss, as a whole. A head in pieces is many small operations, and not
        worth it."""
        if self.spec.compute.compiles_layers or self.head is not None:
            return False
        return is_compiled_whole(len(layers_of(self.state.model)), self.spec.trains.lora is not None)

    def _fits_a_graph(self) -> bool:
        """Whether an update can replay CUDA graphs: alone, and in one forward pass, since a second one would
        overwrite the gradients that the first left in the graph's memory. Small experts are bound by
        launches: twice as fast."""
        is_one_pass = self.spec.blocks_per_update <= self.spec.compute.micro_batch_blocks
        return self.device.type == "cuda" and self.group.world == 1 and is_one_pass
