"""The loss of next-token prediction on blocks."""

from collections.abc import Callable

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
        self.loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = summed_loss
        """`summed_loss`, or that compiled."""

    def forward(self, read_BT: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
        return self.loss_of(self.model(input_ids=read_BT, use_cache=False).logits, blocks_BT)


def summed_loss(logits_BTV: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
    """Summed negative log-likelihood of blocks under the logits of their tokens."""
    logits, tokens = logits_BTV.flatten(0, 1).float(), blocks_BT.flatten()
    return functional.cross_entropy(logits, tokens, reduction="sum", ignore_index=NO_TOKEN)


def read_after(blocks_BT: torch.Tensor, first_token: int) -> torch.Tensor:
    """The tokens a model reads to predict blocks [B, T]: the first token,
    then all of the block but its last."""
    first = torch.full_like(blocks_BT[:, :1], first_token)
    return torch.cat([first, blocks_BT[:, :-1]], dim=1)
