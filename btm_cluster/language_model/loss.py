"""The loss of next-token prediction on blocks."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel


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
    """The tokens a model reads to predict blocks [B, T]: the first token, then all of the block but its last."""
    first = torch.full_like(blocks_BT[:, :1], first_token)
    return torch.cat([first, blocks_BT[:, :-1]], dim=1)
