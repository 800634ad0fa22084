"""Attention for models under torch.compile: causal without a mask, so that FlashAttention may compute it.

transformers leaves the mask of plainly causal blocks out, but not while it is traced: there it cannot look
whether positions start anew within a block (packed sequences). The explicit mask that it then makes rules
FlashAttention out. Our blocks are never packed.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "unpacked_sdpa"


def unpacked_mask(**asked: Any) -> torch.Tensor | None:
    """The mask of `sdpa_mask`; None where that is plainly causal, as it is
    for whole blocks that are not packed."""
    length, window = asked["kv_length"], asked.get("local_size")
    sees_all = window is None or length < window
    is_whole = asked["q_length"] == length and asked.get("attention_mask") is None
    is_custom = asked.get("use_vmap") or asked.get("allow_is_bidirectional_skip")
    if sees_all and is_whole and not is_custom:
        return None
    mask: torch.Tensor | None = sdpa_mask(**asked)
    return mask


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, unpacked_mask)


def attends_by_kernels(model: PreTrainedModel) -> bool:
    """Whether attention is computed by kernels that keep no matrix of scores, not by operations one by one."""
    name: str = model.config.get_text_config()._attn_implementation
    return name != "eager"


def leave_causal_masks_out(model: PreTrainedModel) -> None:
    """Has a model read whole blocks without a mask, where its architecture
    takes attention functions from outside."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
