"""Puts models on a device for an engine: in a precision, and read in the
fastest way that predicts as scoring does."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from btm_cluster.errors import UserError
from btm_cluster.language_model.decoding import Decoder, ReaderDecoder, RowBuffers, reads_on_as_it_scores
from btm_cluster.language_model.model import in_precision
from btm_cluster.language_model.row_cache import RowCacheDecoder
from btm_cluster.language_model.row_check import reads_rows_as_it_scores, usable_stacks

log = logging.getLogger(__name__)
Way = Literal["rows", "readers", "anew"]
"""How experts read on: all rows at once (row_cache.py); each row alone, from
transformers' own cache; or each block anew."""


@dataclass(frozen=True)
class EngineSettings:
    """Sizes and arithmetic of an engine."""

    first_token: int
    """Read before every text: the tokenizer's."""
    vocabulary: int
    """Tokens that the tokenizer has: only these are drawn."""
    block_tokens: int
    """Most tokens of prompt and continuation together."""
    end_of_text: int | None = None
    """The token that ends a text; without one, it never ends by itself."""
    rows: int = 1
    """Sequences at once, at most."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of weights, keys and values.

    Log-probabilities and mixtures are float32, weights of experts float64.
    """
    device: str = "cpu"
    way: Way | None = None
    """By default the fastest that the architecture is served by."""
    captures: bool = True
    """Whether steps are captured as CUDA graphs."""


def open_decoder(
    models: Iterable[PreTrainedModel], settings: EngineSettings
) -> tuple[list[PreTrainedModel], Decoder, Way]:
    """Moves models to the device and says how they read on.

    Each is placed before the next is asked for, which may have to be loaded: how they read on is tried on the
    first, which should be in float32.

    Raises:
        UserError: the device has too little memory; the message says how much a row and the weights take.
    """
    device, way = torch.device(settings.device), settings.way
    placed: list[PreTrainedModel] = []
    try:
        for model in models:
            way = way or fastest_way(model.to(device).eval(), settings.block_tokens)
            placed.append(in_precision(model.eval(), getattr(torch, settings.precision)).to(device))
        assert way is not None, "an engine has a model"
        return placed, _decoder_of(placed, way, settings), way
    except torch.OutOfMemoryError as exc:
        raise _too_little_memory(placed, settings) from exc


@torch.inference_mode()
def _decoder_of(models: Sequence[PreTrainedModel], way: Way, settings: EngineSettings) -> Decoder:
    device = torch.device(settings.device)
    first_11 = torch.tensor([[settings.first_token]], device=device)
    nothing = models[0](input_ids=first_11, use_cache=False).logits
    buffers = RowBuffers.on(device, len(models), settings.rows, nothing.shape[-1], nothing.dtype)
    if way == "rows":
        stacks = usable_stacks(models, settings.block_tokens)
        decoder = RowCacheDecoder(models, buffers, settings.block_tokens, settings.captures, stacks)
        decoder.read([[settings.first_token]], [[0]])  # takes the memory
        return decoder
    return ReaderDecoder(models, buffers, settings.block_tokens if way == "anew" else None)


@torch.inference_mode()
def fastest_way(model: PreTrainedModel, block_tokens: int) -> Way:
    """How a model reads on, so that it predicts as when it reads a block at
    once; tried on a made-up block."""
    if reads_rows_as_it_scores(model, block_tokens):
        return "rows"
    way: Way = "readers" if reads_on_as_it_scores(model, block_tokens) else "anew"
    log.info("%s is continued row by row, %s", type(model).__name__, way)
    return way


def bytes_of(models: Sequence[PreTrainedModel]) -> int:
    """Bytes of the models' parameters, those that they share once."""
    return sum({id(one): one.nbytes for model in models for one in model.parameters()}.values())


def _too_little_memory(models: Sequence[PreTrainedModel], settings: EngineSettings) -> UserError:
    weights = bytes_of(models)
    return UserError(
        "the models do not fit on the device",
        found=f"{len(models)} models of {weights / 1e9:.1f} GB in all so far, and {settings.rows} rows of "
        f"{settings.block_tokens} tokens",
        expected="memory for the weights, and for each row's keys and values in every model",
        remedy="fewer rows, bfloat16, or fewer experts (merging.top_k)",
    )
