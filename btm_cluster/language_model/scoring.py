"""Scores of blocks under one model, each block on its own: the log-probability of
every token, and the entropy of its prediction."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from btm_cluster.data.blocks import Blocks
from btm_cluster.errors import DivergedError
from btm_cluster.language_model.compute import autocast, device_of
from btm_cluster.language_model.head import pieces_of, plain_head, run_with
from btm_cluster.language_model.loss import read_after
from btm_cluster.requests import Resources

LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**20}
"""Logits in float32 held at once beside the model's own, twice: 0.5 GB on a GPU. On a CPU, pieces that malloc
keeps for the next: 73 ms instead of 106 for 16 blocks of 128 tokens and a vocabulary of 2,048 (once, on 29
November 2026, one core)."""

MODELS_LOGITS_AT_ONCE = {"cuda": 2**31, "cpu": 2**28}
"""Logits of one forward pass, 8.6 GB in float32 on a GPU: fewer blocks are taken together then. Of one block that
has more, the head is applied a few tokens at a time."""


def set_up_scoring(how: Resources) -> None:
    """Sets this process's threads and arithmetic, whatever it has done before:
    the same scores in any process."""
    torch.set_float32_matmul_precision("highest")
    if not how.gpus_per_worker:
        torch.set_num_threads(how.cpus_per_worker)


def score_blocks(
    model: PreTrainedModel,
    blocks: Blocks,
    first_token: int,
    how: Resources,
    folder: Path,
    count: Callable[[int], None] = lambda _: None,
) -> dict[str, Path]:
    """Writes log p(x_t | x_<t) of every token, and the entropy in nats of p(· |
    x_<t), as float32 [blocks, tokens] files.

    The log-softmax is taken in float32 whatever the arithmetic of the forward pass. `count` is told how many
    blocks were scored. Returns the files below `folder` by name.

    Raises:
        DivergedError: the model gives log-probabilities that are not finite.
    """
    device = device_of(how.gpus_per_worker)
    model = model.to(device).eval()
    block_tokens = blocks.take(np.zeros(1, dtype=np.int64)).shape[1]
    files = {name: folder / name for name in ("logp.npy", "entropy.npy")}
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(blocks), block_tokens)}
    total = 0.0
    with ExitStack() as stack:  # not memory maps: on a full disk, writing to one kills the process
        opened = [stack.enter_context(file.open("wb")) for file in files.values()]
        for out in opened:
            np.lib.format.write_array_header_1_0(out, header)
        logits = block_tokens * model.config.get_text_config().vocab_size
        fitting = MODELS_LOGITS_AT_ONCE[device.type] // logits
        head = None if fitting else plain_head(model)
        at_once = max(1, min(how.micro_batch_blocks, fitting))
        for start in range(0, len(blocks), at_once):
            rows = np.arange(start, min(start + at_once, len(blocks)))
            scored = score_tokens(
                model, torch.from_numpy(blocks.take(rows)).to(device), first_token, how, head
            )
            for out, values_BT in zip(opened, scored, strict=True):
                out.write(values_BT.cpu().numpy().astype("<f4", copy=False).tobytes())
            total += float(scored[0].double().sum())
            count(len(rows))
    if not math.isfinite(total):
        raise DivergedError(
            "the model gives log-probabilities that are not finite",
            found=f"a sum of {total} over {len(blocks)} blocks",
            remedy="its training diverged: lower training.learning_rate or gradient_clip",
        )
    return files


@torch.inference_mode()
def score_tokens(
    model: PreTrainedModel,
    blocks_BT: torch.Tensor,
    first_token: int,
    how: Resources,
    head: torch.nn.Linear | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(x_t | x_<t) of each token of blocks [B, T], and the entropy of the
    prediction it was: both float32 [B, T].

    With the model's plain `head`, that is applied a few tokens at a time.
    """
    read_BT, tokens_N = read_after(blocks_BT, first_token), blocks_BT.flatten()
    with autocast(device_of(how.gpus_per_worker), how.precision):
        if head is None:
            logits = model(input_ids=read_BT, use_cache=False).logits
        else:
            said_N2 = run_with(model, head, read_BT, lambda hidden: _said_in_pieces(hidden, head, tokens_N))
    logp_N, entropy_N = said_of(logits.flatten(0, 1), tokens_N) if head is None else said_N2.T
    return logp_N.view_as(blocks_BT), entropy_N.view_as(blocks_BT)


def said_of(logits_NV: torch.Tensor, tokens_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token under its logits, and the entropy of the
    prediction it was: both float32 [N]."""
    logp_N, entropy_N = (torch.empty(len(tokens_N), device=logits_NV.device) for _ in range(2))
    at_once = max(1, LOGITS_AT_ONCE[logits_NV.device.type] // logits_NV.shape[-1])
    for start in range(0, len(tokens_N), at_once):
        part = slice(start, start + at_once)
        logp_NV = torch.log_softmax(logits_NV[part].float(), dim=-1)
        logp_N[part] = logp_NV.gather(1, tokens_N[part, None])[:, 0]
        entropy_N[part] = _entropy(logp_NV)
    return logp_N, entropy_N


def _said_in_pieces(hidden_BTD: torch.Tensor, head: torch.nn.Linear, tokens_N: torch.Tensor) -> torch.Tensor:
    """As `said_of`, of the head's logits for hidden states: float32 [N, 2]."""
    hidden_ND = hidden_BTD.flatten(0, 1)
    said = [
        torch.stack(
            said_of(functional.linear(hidden_ND[piece], head.weight, head.bias), tokens_N[piece]), dim=1
        )
        for piece in pieces_of(hidden_ND, head)
    ]
    return torch.cat(said)


def _entropy(logp_NV: torch.Tensor) -> torch.Tensor:
    """Entropies in nats: [N]. A product of rows is faster than `entr`; the clamp makes a token that a model
    rules out add 0, and asks a GPU nothing."""
    entropy_N: torch.Tensor = -torch.linalg.vecdot(
        logp_NV.exp(), logp_NV.clamp(min=torch.finfo(logp_NV.dtype).min)
    )
    return entropy_N
