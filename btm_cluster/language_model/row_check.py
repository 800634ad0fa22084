"""Whether models read on in rows, and adapters in a stack, as they score: tried on made-up text before an engine
serves.

The letters are those of decoding.py.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from btm_cluster.errors import UserError
from btm_cluster.language_model.adapter_stacks import Stack, alone, stacked
from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.decoding import RowBuffers, are_alike, beginnings
from btm_cluster.language_model.row_cache import RowCacheDecoder

log = logging.getLogger(__name__)

_FURTHER = 3
"""Predictions that are compared of each row: after its prompt, and after each of two tokens more."""
_TRIED = 64
"""Tokens of the text on which a stack is tried, at most."""
_MOST_MOVED = {torch.float32: 1e-3}
_MOST_MOVED_IN_16_BITS = 0.2
"""Probability that rounding moves from tokens to others, at most: 0.05 was seen in 16 bits, where log-probabilities of
unlikely tokens differ by half a nat."""
_NEARER = 0.05
"""By so much less, in the mean, may be moved to another expert's prediction: by rounding in 16 bits it was 0.02, of
experts that hardly differ."""


@torch.inference_mode()
def reads_rows_as_it_scores(model: PreTrainedModel, block_tokens: int) -> bool:
    """Whether a model predicts so as it does when it reads a block at once,
    whatever rows it reads beside each other.

    A made-up block is read as a prompt and then on: after its first token, in one row alone; then so beside a
    row that begins nearly at its end.
    """
    return _read_as_they_score([model.eval()], block_tokens, None, are_alike)


@torch.inference_mode()
def usable_stacks(models: Sequence[PreTrainedModel], block_tokens: int) -> list[Stack]:
    """The models stacked where that predicts as each by itself, which is tried on a made-up text with the first stack
    of each form; the others alone."""
    each_alone, usable, are_usable = alone(models), list[Stack](), dict[Any, bool]()
    for stack in stacked(models):
        if len(stack.experts) == 1:
            usable.append(stack)
            continue
        if stack.form not in are_usable:
            members = [models[place] for place in stack.experts]
            are_usable[stack.form] = _is_usable(members, stack, block_tokens)
        if are_usable[stack.form]:
            usable.append(stack)
        else:
            log.info("adapters of %s read on one by one", type(stack.model).__name__)
            usable += [each_alone[place] for place in stack.experts]
    return usable


def _is_usable(members: Sequence[PreTrainedModel], stack: Stack, block_tokens: int) -> bool:
    as_one = [Stack(tuple(range(len(members))), stack.model)]
    try:
        return _read_as_they_score(members, min(block_tokens, _TRIED), as_one, _predict_alike)
    except UserError:  # one of them predicts values that are not finite: it need not be asked
        return False


def _predict_alike(stacked_ERV: torch.Tensor, own_ERV: torch.Tensor) -> bool:
    """Whether a stack's logits mean its experts' own distributions, but for rounding, and each rather its own expert's
    than the next one's."""
    p_ERV, q_ERV = (torch.softmax(logits_ERV.float(), dim=-1) for logits_ERV in (stacked_ERV, own_ERV))
    moved_ER, to_next_ER = (
        (p_ERV - q.roll(n, dims=0)).abs().sum(dim=-1) / 2 for q, n in ((q_ERV, 0), (q_ERV, -1))
    )
    most = _MOST_MOVED.get(own_ERV.dtype, _MOST_MOVED_IN_16_BITS)
    is_own_E = moved_ER.mean(dim=1) <= to_next_ER.mean(dim=1) + _NEARER
    return bool(moved_ER.max() <= most and is_own_E.all())


def _read_as_they_score(
    models: Sequence[PreTrainedModel],
    block_tokens: int,
    stacks: Sequence[Stack] | None,
    alike: Callable[[torch.Tensor, torch.Tensor], bool],
) -> bool:
    block_1T = random_block(models[0].config.vocab_size, block_tokens).to(models[0].device)
    firsts = beginnings(block_tokens)
    counts = sorted({_count(first, further, block_tokens) for first in firsts for further in range(_FURTHER)})
    compared = torch.tensor(counts) - 1
    # Of each model what is compared alone: the whole of a large vocabulary's logits would be gigabytes.
    own_ECV = torch.stack([logits_of(model, block_1T, type(model).__name__)[0, compared] for model in models])
    own = dict(zip(counts, own_ECV.unbind(dim=1), strict=True))
    tokens = block_1T[0].tolist()
    try:
        return all(_reads_on(models, tokens, own, tried, stacks, alike) for tried in (firsts[:1], firsts))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # architectures without such a cache raise whatever they stumble over
        return False


def _count(first: int, further: int, block_tokens: int) -> int:
    return min(first + further, block_tokens)


def _reads_on(
    models: Sequence[PreTrainedModel],
    tokens: Sequence[int],
    own: Mapping[int, torch.Tensor],
    firsts: Sequence[int],
    stacks: Sequence[Stack] | None,
    alike: Callable[[torch.Tensor, torch.Tensor], bool],
) -> bool:
    """Reads the first tokens of a block into a row for each number of them, and
    two more; compares every prediction with the models' own, [E, V] by the number of tokens before it."""
    example_EV = next(iter(own.values()))
    buffers = RowBuffers.on(
        example_EV.device, len(models), len(firsts), example_EV.shape[1], example_EV.dtype
    )
    decoder = RowCacheDecoder(models, buffers, len(tokens), captures=False, stacks=stacks)
    rows = list(range(len(firsts)))
    decoder.read([tokens[:first] for first in firsts], [[row] for row in rows])
    for further in range(_FURTHER):
        counts = [_count(first, further, len(tokens)) for first in firsts]
        if not alike(buffers.logits_ERV, torch.stack([own[count] for count in counts], dim=1)):
            return False
        places = torch.tensor(counts).clamp(max=len(tokens) - 1)
        buffers.places_R.copy_(places)
        buffers.tokens_R.copy_(torch.tensor(tokens)[places])
        decoder.read_on(rows, range(len(models)), int(places.max()))
    return True
