"""Loss on development blocks while a model trains. It is looked at, and changes nothing that is trained."""

import torch
from torch.nn import functional

from btm_cluster.curve import development_size, development_updates
from btm_cluster.language_model.batches import split_into_micro_batches
from btm_cluster.language_model.loss import (
    FILLER,
    head_for,
    loss_by_head,
    predicted_tokens,
    read_after,
    read_tokens,
    summed_loss,
)
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState

LOGITS_AT_ONCE = {"cuda": 2**29, "cpu": 2**26}
"""Most logits of one pass: 1 GiB in bfloat16. Passes of one block would be bound by kernel launches."""
LOSSES_AT_ONCE = 2**26
"""Logits turned to float32 at once, for the loss."""


class DevelopmentLoss:
    """The loss of one training on its development blocks, which all ranks take together, each on some.

    Forward passes are not compiled: compiled ones would be recorded anew for another mode and shape. A model in
    evaluation draws no random numbers. A sharded model's passes are collectives: every rank makes as many.
    """

    def __init__(self, spec: TrainingSpec, state: TrainingState, group: ProcessGroup) -> None:
        self._spec, self._state, self._group = spec, state, group
        self._updates: set[int] = set()
        blocks_DNT = spec.development_DNT
        if blocks_DNT is None or not (blocks_DNT >= 0).any():
            return
        points, _ = development_size(spec.training.updates, spec.training.blocks_per_domain_update)
        self._updates = {*development_updates(spec.training.updates, points), *spec.ends}
        if not spec.from_scratch:
            self._updates.add(spec.first_update)
        self._tokens = int((blocks_DNT >= 0).sum())
        self._blocks_BT = self._own(blocks_DNT).to(spec.compute.device)
        with spec.compute.arithmetic():
            self._head = head_for(state.model, spec.training.block_tokens)

    def is_due(self, update: int) -> bool:
        """Whether it is taken where the training stands at `update`: the same on all ranks."""
        return update in self._updates

    @torch.no_grad()
    def take(self) -> torch.Tensor:
        """Mean negative log-likelihood per predicted token over all ranks' blocks, in nats, still on the device."""
        spec, model = self._spec, self._state.model
        total = torch.zeros((), device=spec.compute.device)
        model.eval()
        for blocks_BT in self._passes():
            with spec.compute.arithmetic(), torch.compiler.set_stance("force_eager"):
                read_BT = read_after(read_tokens(blocks_BT), spec.first_token)
                targets_BT = predicted_tokens(blocks_BT)
                if self._head is not None:
                    total += loss_by_head(model, self._head, read_BT, targets_BT)
                    continue
                logits_BTV = model(input_ids=read_BT, use_cache=False).logits
                parts = max(1, LOSSES_AT_ONCE // logits_BTV[0].numel())
                for pair in zip(torch.split(logits_BTV, parts), torch.split(targets_BT, parts), strict=True):
                    total += summed_loss(*pair)
        model.train()
        return self._group.sum(total) / self._tokens

    def _own(self, blocks_DNT: torch.Tensor) -> torch.Tensor:
        """This rank's blocks; of a DEMix, those of its own domains, domain after domain."""
        share = self._state.share
        if share is None:
            blocks_BT = blocks_DNT.flatten(0, 1)
            if self._spec.compute.is_sharded:
                blocks_BT = functional.pad(
                    blocks_BT, (0, 0, 0, -len(blocks_BT) % self._group.world), value=FILLER
                )
            return blocks_BT[self._group.rank :: self._group.world]
        own = blocks_DNT[share.domains.start : share.domains.stop, share.number :: share.ranks_per_domain]
        return own.flatten(0, 1)

    def _passes(self) -> list[torch.Tensor]:
        blocks_BT = self._blocks_BT
        if not len(blocks_BT):  # of a group larger than there are blocks
            return []
        logits = blocks_BT.shape[1] * self._state.model.config.vocab_size
        at_once = max(
            1, min(self._spec.compute.micro_batch_blocks, LOGITS_AT_ONCE[blocks_BT.device.type] // logits)
        )
        return list(split_into_micro_batches(blocks_BT, at_once, self._state.share))
