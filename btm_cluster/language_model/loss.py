"""The loss of next-token prediction on blocks."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel


class NextTokenLoss(torch.nn.Module):
    """Summed negative log-likelihood of blocks [B, T], given what was read
    before each of their tokens (`read_after`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, read_BT: torch.Tensor, blocks_BT: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=read_BT, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), blocks_BT.flatten(), reduction="sum")


def read_after(blocks_BT: torch.Tensor, first_token: int) -> torch.Tensor:
    """The tokens a model reads to predict blocks [B, T]: the first token,
    then all of the block but its last."""
    first = torch.full_like(blocks_BT[:, :1], first_token)
    return torch.cat([first, blocks_BT[:, :-1]], dim=1)
