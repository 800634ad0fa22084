"""The loss of next-token prediction on blocks.

Blocks are int64 [B, T]. A token that is read and not predicted stands in them as `~token`, which is negative.
"""

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from btm_cluster.language_model.head import plain_head, run_with, summed_loss_in_pieces

NO_TOKEN = -100
"""In place of a token that is not there: nothing is lost on it."""
FILLER = ~0
"""A token in blocks that is read and not predicted: it fills up what ranks take together."""
LARGEST_BLOCK_LOGITS = {"cuda": 2**30, "cpu": 2**28}
"""Logits of a block, up to which they are held whole. A training holds them several times over: more than 12 GB
for this many on a GPU, where nothing is compiled. With fewer, a training takes fewer blocks at once
(`cluster.micro_batch_blocks`)."""


class NextTokenLoss(torch.nn.Module):
    """Summed negative log-likelihood of blocks [B, T], given what was read
    before each of their tokens (`read_after`)."""

    def __init__(self, model: PreTrainedModel, head: torch.nn.Linear | None = None) -> None:
        """With the model's plain `head`, that is applied a few tokens at a time."""
        super().__init__()
        self.model = model
        self._head = () if head is None else (head,)  # in a tuple, so that it is no part of this module twice
        self.loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = summed_loss
        """`summed_loss`, or that compiled."""

    def forward(self, read_BT: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
        if self._head:
            return loss_by_head(self.model, *self._head, read_BT, blocks_BT)
        return self.loss_of(self.model(input_ids=read_BT, use_cache=False).logits, blocks_BT)


def loss_by_head(
    model: PreTrainedModel, head: torch.nn.Linear, read_BT: torch.Tensor, blocks_BT: torch.Tensor
) -> torch.Tensor:
    """The loss of a model that reads `read_BT`, with its head applied a few tokens at a time."""
    return run_with(
        model, head, read_BT, lambda hidden: summed_loss_in_pieces(hidden, head, blocks_BT, NO_TOKEN)
    )


def summed_loss(logits_BTV: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of blocks under the logits of their tokens."""
    logits, tokens = logits_BTV.flatten(0, 1).float(), blocks_BT.flatten()
    return functional.cross_entropy(logits, tokens, reduction="sum", ignore_index=NO_TOKEN)


def head_for(model: PreTrainedModel, block_tokens: int) -> torch.nn.Linear | None:
    """The model's head, where it is to be applied a few tokens at a time, and can be. To be called in the
    arithmetic of a forward pass, for it is one. Of a sharded model, a collective."""
    logits = block_tokens * model.config.get_text_config().vocab_size
    device = next(model.parameters()).device.type
    return plain_head(model) if logits > LARGEST_BLOCK_LOGITS[device] else None


def read_tokens(blocks_BT: torch.Tensor) -> torch.Tensor:
    """The tokens of blocks, whether they are predicted or not."""
    return torch.where(blocks_BT < 0, ~blocks_BT, blocks_BT)


def predicted_tokens(blocks_BT: torch.Tensor) -> torch.Tensor:
    """The tokens of blocks that are predicted, NO_TOKEN in place of the others."""
    return blocks_BT.masked_fill(blocks_BT < 0, NO_TOKEN)


def read_after(blocks_BT: torch.Tensor, first_token: int) -> torch.Tensor:
    """The tokens a model reads to predict blocks [B, T]: the first token,
    then all of the block but its last."""
    first = torch.full_like(blocks_BT[:, :1], first_token)
    return torch.cat([first, blocks_BT[:, :-1]], dim=1)
