"""Token log-probabilities of blocks under one model: float32 [blocks, tokens], each block on its own."""

import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from btm_cluster.errors import TrainingError
from btm_cluster.language_model.blocks import Blocks
from btm_cluster.language_model.training import autocast, device_of, read_after_end
from btm_cluster.workers import Resources


def score_blocks(model: PreTrainedModel, blocks: Blocks, end_of_text: int, how: Resources, file: Path) -> float:
    """Writes log p(x_t | x_<t) of every token to `file` as .npy, streaming; returns the sum over all tokens.

    The log-softmax is taken in float32 whatever the arithmetic of the forward pass.

    Raises:
        TrainingError: the model gives log-probabilities that are not finite.
    """
    device = device_of(how)
    model = model.to(device).eval()
    block_tokens = blocks.take(np.zeros(1, dtype=np.int64)).shape[1]
    scores = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(len(blocks), block_tokens))
    total = 0.0
    for start in range(0, len(blocks), how.micro_batch_blocks):
        rows = np.arange(start, min(start + how.micro_batch_blocks, len(blocks)))
        logp_BT = token_log_probabilities(model, torch.from_numpy(blocks.take(rows)).to(device), end_of_text, how)
        scores[rows] = logp_BT.cpu().numpy()
        total += float(logp_BT.double().sum())
    if not math.isfinite(total):
        raise TrainingError(
            "the model gives log-probabilities that are not finite",
            found=f"a sum of {total} over {len(blocks)} blocks",
            remedy="its training diverged: lower training.learning_rate or gradient_clip",
        )
    scores.flush()
    return total


@torch.inference_mode()
def token_log_probabilities(
    model: PreTrainedModel, blocks_BT: torch.Tensor, end_of_text: int, how: Resources
) -> torch.Tensor:
    """log p(x_t | x_<t) of each token of blocks [B, T]: float32 [B, T]."""
    with autocast(how):
        logits = model(input_ids=read_after_end(blocks_BT, end_of_text), use_cache=False).logits
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), blocks_BT.flatten(), reduction="none")
    return -losses.view_as(blocks_BT)
