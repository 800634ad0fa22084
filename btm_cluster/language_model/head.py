"""A model's head, applied to a few tokens at a time: logits of a long block by a large vocabulary are never there
as a whole.

8,192 tokens by a vocabulary of 150,000 are 5 GB in float32, and a loss holds them several times over.
"""

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import PreTrainedModel

LOGITS_AT_ONCE = {"cuda": 2**28, "cpu": 2**24}
"""Logits of a piece: 1 GiB in float32 on a GPU."""

OfHidden = Callable[[torch.Tensor], torch.Tensor]


def plain_head(model: PreTrainedModel) -> torch.nn.Linear | None:
    """The linear map whose outputs are the model's logits; None where it has none, or does more to them, as by a
    cap or a scale. Tried on a token: of a sharded model, by all ranks."""
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return None
    device = next(model.parameters()).device
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=device)
    # So large that no cap leaves them as they are.
    probe_11V = torch.linspace(-1e4, 1e4, head.out_features, device=device).view(1, 1, -1)
    with torch.no_grad():
        made = run_with(model, head, token_11, lambda _: probe_11V.clone())
    return head if torch.equal(made, probe_11V) else None


def run_with(
    model: PreTrainedModel, head: torch.nn.Linear, read_BT: torch.Tensor, act: OfHidden
) -> torch.Tensor:
    """The result of `act` on the hidden states [B, T, D], in place of the head's logits and within the model's own
    forward pass, in which a sharded model's weights are there."""
    head.forward = act  # type: ignore[method-assign, assignment]
    try:
        made: torch.Tensor = model(input_ids=read_BT, use_cache=False).logits
    finally:
        del head.forward
    return made


def pieces_of(hidden_ND: torch.Tensor, head: torch.nn.Linear) -> list[slice]:
    """Stretches of tokens whose logits are held at once."""
    at_once = max(1, LOGITS_AT_ONCE[hidden_ND.device.type] // head.out_features)
    return [slice(start, start + at_once) for start in range(0, len(hidden_ND), at_once)]


def summed_loss_in_pieces(
    hidden_BTD: torch.Tensor, head: torch.nn.Linear, blocks_BT: torch.Tensor, no_token: int
) -> torch.Tensor:
    """Summed negative log-likelihood of blocks, as of all logits at once; `no_token` stands for one that is not
    there.

    The gradients are computed with the loss, so that nothing is computed twice.
    """
    weight_VD: torch.Tensor = head.weight
    bias_V: torch.Tensor | None = head.bias
    if not torch.is_grad_enabled():  # which a function of autograd does not ask
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_BTD.flatten(0, 1), weight_VD, bias_V, blocks_BT.flatten(), head, no_token
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        tokens_N: torch.Tensor,
        head: torch.nn.Linear,
        no_token: int,
    ) -> torch.Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        loss = torch.zeros((), device=hidden_ND.device)
        slope_ND = torch.empty_like(hidden_ND) if of_hidden else None
        slope_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if of_weight else None
        slope_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if of_bias else None
        for piece in pieces_of(hidden_ND, head):
            tokens = tokens_N[piece]
            logits_NV = functional.linear(hidden_ND[piece], weight_VD, bias_V)
            logp_NV = torch.log_softmax(logits_NV.float(), dim=-1)
            loss += functional.nll_loss(logp_NV, tokens, reduction="sum", ignore_index=no_token)
            is_there = (tokens != no_token)[:, None]
            change_NV = logp_NV.exp_().mul_(is_there)
            change_NV.scatter_add_(1, tokens.clamp(min=0)[:, None], -is_there.to(change_NV.dtype))
            change_NV = change_NV.to(logits_NV.dtype)
            if slope_ND is not None:
                slope_ND[piece] = change_NV @ weight_VD
            if slope_VD is not None:
                slope_VD += change_NV.T @ hidden_ND[piece]
            if slope_V is not None:
                slope_V += change_NV.float().sum(0)
        ctx.save_for_backward(slope_ND, slope_VD, slope_V)
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return loss

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):  # type: ignore[no-untyped-def]
        slope_ND, slope_VD, slope_V = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if slope_ND is None else slope_ND * upstream,
            None if slope_VD is None else slope_VD.mul_(upstream).to(of_weight),
            None if slope_V is None else (slope_V * upstream).to(of_bias),
            None,
            None,
            None,
        )
