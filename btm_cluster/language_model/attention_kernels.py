"""The kernel by which a GPU computes plainly causal attention: cuDNN's where that is quicker than FlashAttention 2.

Torch tries FlashAttention first. On Hopper cuDNN's is often about twice as fast, on other GPUs it is not, and on some
shapes it fails: so both are tried on the model's own shape, on the GPU that will compute it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch.compiler import config as compiler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from btm_cluster.language_model.attention import attends_by_kernels

log = logging.getLogger(__name__)
HOPPER = 9
"""Major compute capability of the GPUs on which cuDNN's kernel is tried.

Source: measurements on six kinds of GPU in huggingface/transformers, pull request 48163: 1.7 to 2.3 times as fast on
Hopper for shapes of training, 0.8 to 1.0 times elsewhere.
"""
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CUDNN_TAG = "cudnn-first"
_TOKENS, _WARM_UPS, _REPEATS = 2**14, 2, 5
"""Of a trial: enough to fill a GPU, of blocks that may be shorter than a model's."""

Kernels = Callable[[], AbstractContextManager[Any]]
"""Opens a context within which forward and backward passes are computed, and compiled, by chosen kernels."""


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention."""

    heads: int
    key_heads: int
    head_width: int
    tokens: int


def kernels_for(model: PreTrainedModel, block_tokens: int, precision: str, device: torch.device) -> Kernels:
    """The kernels for whole blocks: the quickest, where a model attends plainly and in bfloat16, and else torch's own
    choice."""
    shape = plain_shape(model, block_tokens)
    if device.type != "cuda" or precision != "bfloat16" or shape is None:
        return nullcontext
    if torch.cuda.get_device_capability(device)[0] != HOPPER or not _is_cudnn_quicker(shape, device):
        return nullcontext
    return cudnn_first


@contextmanager
def cudnn_first() -> Iterator[None]:
    """cuDNN's kernel where it can, and torch's own order after it.

    Code that is compiled within is kept under a tag of its own: torch finds kept code by the model's operations, before
    it chooses kernels for them, and would take what another process compiled with FlashAttention.
    """
    tagged = compiler.patch(cache_key_tag=compiler.cache_key_tag + _CUDNN_TAG)  # type: ignore[attr-defined]
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True), tagged:
        yield


def plain_shape(model: PreTrainedModel, block_tokens: int) -> AttentionShape | None:
    """The shape of attention over whole blocks; None where windows within a block want a mask, where no kernel computes
    it, or the configuration does not say."""
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or (width // heads if heads and width else None)
    if not attends_by_kernels(model) or (isinstance(window, int) and window <= block_tokens):
        return None
    if isinstance(heads, int) and isinstance(key_heads, int) and isinstance(head_width, int):
        return AttentionShape(heads, key_heads, head_width, block_tokens)
    return None  # some have lists, by layer


@cache
def _is_cudnn_quicker(shape: AttentionShape, device: torch.device) -> bool:
    try:
        flash, cudnn = (
            _milliseconds(backend, shape, device)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        )
    except RuntimeError as exc:  # a kernel does not take the shape
        log.info("attention by torch's own choice of kernels: %s", exc)
        return False
    log.info("attention of %s: FlashAttention %.2f ms, cuDNN %.2f ms", shape, flash, cudnn)
    return cudnn < flash


def _milliseconds(backend: SDPBackend, shape: AttentionShape, device: torch.device) -> float:
    """Milliseconds of a forward and a backward pass over a few blocks.

    Raises:
        RuntimeError: it cannot compute them.
    """
    tokens = min(shape.tokens, _TOKENS)

    def drawn(heads: int) -> torch.Tensor:
        """As models lay them out: heads side by side in each token's row."""
        sizes = (_TOKENS // tokens, tokens, heads, shape.head_width)
        return torch.randn(sizes, dtype=torch.bfloat16, device=device)

    read = [drawn(heads).requires_grad_() for heads in (shape.heads, shape.key_heads, shape.key_heads)]
    slope = drawn(shape.heads)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]  # type: ignore[no-untyped-call]
    with sdpa_kernel(backend), torch.autocast(device.type, enabled=False):
        for number in range(_WARM_UPS + _REPEATS):
            if number >= _WARM_UPS:
                marks[number - _WARM_UPS].record()
            query, key, value = (one.transpose(1, 2) for one in read)
            is_grouped = shape.heads != shape.key_heads
            made = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=is_grouped)
            torch.autograd.grad(made.transpose(1, 2), read, slope)
        marks[-1].record()
    marks[-1].synchronize()
    # The quickest: others may share the GPU.
    milliseconds: float = min(began.elapsed_time(ended) for began, ended in pairwise(marks))
    return milliseconds
