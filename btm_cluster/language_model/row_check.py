"""Whether models read on in rows, and adapters in a stack, as they score: tried on made-up text before an engine
serves.

The letters are those of decoding.py.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from btm_cluster.language_model.adapter_stacks import Stack, alone, stacked
from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.decoding import RowBuffers, are_alike, beginnings
from btm_cluster.language_model.row_cache import RowCacheDecoder

log = logging.getLogger(__name__)

_TRIED = 64
"""Tokens of the text on which a stack is tried, at most."""
_MOST_MOVED = {torch.float32: 1e-3}
_MOST_MOVED_IN_16_BITS = 0.2
"""Probability that rounding moves from tokens to others, at most: 0.05 was seen in 16 bits, where log-probabilities of
unlikely tokens differ by half a nat."""


@torch.inference_mode()
def reads_rows_as_it_scores(model: PreTrainedModel, block_tokens: int) -> bool:
    """Whether a model predicts so as it does when it reads a block at once,
    whatever rows it reads beside each other.

    A made-up block is read as a prompt and then on: after its first token, in one row alone; then so beside a
    row that begins nearly at its end.
    """
    return _read_as_they_score([model.eval()], block_tokens, None, are_alike)


@torch.inference_mode()
def usable_stacks(models: Sequence[PreTrainedModel], block_tokens: int) -> Sequence[Stack]:
    """The models stacked where that predicts as each by itself, which is tried on a made-up text; else each alone."""
    stacks = stacked(models)
    largest = max(stacks, key=lambda stack: len(stack.experts))
    if len(largest.experts) == 1:
        return stacks
    members = [models[place] for place in largest.experts]
    as_one = [Stack(tuple(range(len(members))), largest.model)]
    if _read_as_they_score(members, min(block_tokens, _TRIED), as_one, _predict_alike):
        return stacks
    log.info("adapters of %s read on one by one", type(models[0]).__name__)
    return alone(models)


def _predict_alike(one_ERV: torch.Tensor, other_ERV: torch.Tensor) -> bool:
    """Whether logits mean the same distributions, but for rounding."""
    p_ERV, q_ERV = (torch.softmax(logits_ERV.float(), dim=-1) for logits_ERV in (one_ERV, other_ERV))
    moved_ER = (p_ERV - q_ERV).abs().sum(dim=-1) / 2
    return bool(moved_ER.max() <= _MOST_MOVED.get(one_ERV.dtype, _MOST_MOVED_IN_16_BITS))


def _read_as_they_score(
    models: Sequence[PreTrainedModel],
    block_tokens: int,
    stacks: Sequence[Stack] | None,
    alike: Callable[[torch.Tensor, torch.Tensor], bool],
) -> bool:
    block_1T = random_block(models[0].config.vocab_size, block_tokens).to(models[0].device)
    at_once_ETV = torch.cat([logits_of(model, block_1T, type(model).__name__) for model in models])
    tokens, firsts = block_1T[0].tolist(), beginnings(block_tokens)
    try:
        return all(
            _reads_on(models, tokens, at_once_ETV, tried, stacks, alike) for tried in (firsts[:1], firsts)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # architectures without such a cache raise whatever they stumble over
        return False


def _reads_on(
    models: Sequence[PreTrainedModel],
    tokens: Sequence[int],
    at_once_ETV: torch.Tensor,
    firsts: Sequence[int],
    stacks: Sequence[Stack] | None,
    alike: Callable[[torch.Tensor, torch.Tensor], bool],
) -> bool:
    """Reads the first tokens of a block into a row for each number of them, and
    two more; compares every prediction."""
    device, experts = at_once_ETV.device, range(len(models))
    buffers = RowBuffers.on(device, len(models), len(firsts), at_once_ETV.shape[2], at_once_ETV.dtype)
    decoder = RowCacheDecoder(models, buffers, len(tokens), captures=False, stacks=stacks)
    rows = list(range(len(firsts)))
    decoder.read([tokens[:first] for first in firsts], [[row] for row in rows])
    for further in range(3):
        counts = torch.tensor([min(first + further, len(tokens)) for first in firsts])
        if not alike(buffers.logits_ERV, at_once_ETV[:, counts - 1]):
            return False
        places = counts.clamp(max=len(tokens) - 1)
        buffers.places_R.copy_(places)
        buffers.tokens_R.copy_(torch.tensor(tokens)[places])
        decoder.read_on(rows, experts, int(places.max()))
    return True
