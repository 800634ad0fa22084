"""The loss of next-token prediction on blocks.

Blocks are int64 [B, T]. A token that is read and not predicted stands in them as `~token`, which is negative.
"""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

NO_TOKEN = -100
"""In place of a token that is not there: nothing is lost on it."""


class NextTokenLoss(torch.nn.Module):
    """Summed negative log-likelihood of blocks [B, T], given what was read
    before each of their tokens (`read_after`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, read_BT: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
        return summed_loss(self.model(input_ids=read_BT, use_cache=False).logits, blocks_BT)


def summed_loss(logits_BTV: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of blocks under the logits of their tokens."""
    logits, tokens = logits_BTV.flatten(0, 1).float(), blocks_BT.flatten()
    return functional.cross_entropy(logits, tokens, reduction="sum", ignore_index=NO_TOKEN)


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
