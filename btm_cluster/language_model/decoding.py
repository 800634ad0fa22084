"""Experts that read on: what they have read of several sequences, and their
predictions of each sequence's next token.

Here is the way that serves every architecture: each expert and sequence alone, by the cache that transformers
makes for it, or by reading a block anew. row_cache.py is the fast way, for those that it serves. Neither
knows of posteriors or draws.

E experts, R sequences (rows), T tokens, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.scoring import said_of

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Names of transformers' key-value cache: the second in 5.17, the first in 5.24."""
LARGEST_DIFFERENCE = {torch.float32: 1e-3}
"""Nats between log-probabilities that are the same but for rounding, in float32."""
_LARGEST_ROUGH_DIFFERENCE = 0.25
"""The same in 16 bits."""


@dataclass(frozen=True)
class RowBuffers:
    """State of all rows of an engine on their device, at fixed addresses."""

    tokens_R: torch.Tensor
    """The token to be read next: int64."""
    places_R: torch.Tensor
    """Its place, from 0 for the tokenizer's first token: int64."""
    logits_ERV: torch.Tensor
    """Each expert's prediction after what it has read."""

    @classmethod
    def on(
        cls, device: torch.device, experts: int, rows: int, vocabulary: int, dtype: torch.dtype
    ) -> "RowBuffers":
        """Empty ones."""
        whole_R = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(
            whole_R, whole_R.clone(), torch.zeros(experts, rows, vocabulary, dtype=dtype, device=device)
        )


@dataclass(frozen=True)
class ReadPrompt:
    """How well experts predicted a prompt, on the host: float64, of float32 values."""

    logp_ET: torch.Tensor
    """log p_j of each token, the tokenizer's first token apart, which none predicts."""
    entropy_ET: torch.Tensor
    """Nats of each prediction, and of that of the token to come: one more."""


class Decoder(Protocol):
    """Experts of one architecture that read several sequences."""

    buffers: RowBuffers

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs."""

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the keys and values that are kept for every row, used or not."""

    def read(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[ReadPrompt]:
        """Reads each prompt, with the tokenizer's first token before it, into all of its rows. The buffers
        then have what is predicted after them."""

    def read_on(self, rows: Sequence[int], experts: Sequence[int], longest: int) -> None:
        """Reads the buffers' tokens at the buffers' places, of which none of
        these rows has one above `longest`.

        Other rows and other experts are undefined afterwards, until they are read into anew.
        """

    def forget(self, row: int) -> None:
        """Frees what was read into a row."""


@dataclass
class Reader:
    """An expert and what it keeps of one sequence."""

    model: PreTrainedModel
    block_tokens: int | None = None
    """Where given, it keeps nothing, and reads as much at once as scoring does:
    what was read, filled up to a block."""
    cache: Any = None
    tokens: list[int] = field(default_factory=list)

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits for the token after each of these: [tokens, V]."""
        self.tokens += tokens
        if self.block_tokens is not None:
            filled = self.tokens + [0] * (self.block_tokens - len(self.tokens))
            ids_1T = torch.tensor([filled], device=self.model.device)
            whole_TV: torch.Tensor = self.model(input_ids=ids_1T, use_cache=False).logits[0]
            return whole_TV[: len(self.tokens)][-len(tokens) :]
        if self.cache is None:  # at the beginning; a model that keeps no cache reads everything again
            return self._ask(self.tokens)[-len(tokens) :]
        # One by one: Mamba and Jamba compute several tokens that continue a cache from an empty state.
        return torch.cat([self._ask([token]) for token in tokens])

    def _ask(self, tokens: Sequence[int]) -> torch.Tensor:
        fresh = torch.tensor([tokens], device=self.model.device)
        said = self.model(input_ids=fresh, use_cache=True, **{CACHE: self.cache})
        self.cache = getattr(said, CACHE, None)
        logits_TV: torch.Tensor = said.logits[0]
        return logits_TV


class ReaderDecoder:
    """A `Reader` for each expert and row: slow, and right for every architecture."""

    captures = False
    bytes_per_row = 0

    def __init__(
        self, models: Sequence[PreTrainedModel], buffers: RowBuffers, block_tokens: int | None
    ) -> None:
        """With `block_tokens`, for models that do not read on as they score: they
        read a block anew for every token."""
        self.buffers = buffers
        self._models = models
        self._block_tokens = block_tokens
        self._readers: dict[int, list[Reader]] = {}

    def read(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[ReadPrompt]:
        return [self._read(prompt, into) for prompt, into in zip(prompts, rows, strict=True)]

    def _read(self, prompt: Sequence[int], rows: Sequence[int]) -> ReadPrompt:
        for row in rows:
            self._readers[row] = [Reader(model, self._block_tokens) for model in self._models]
            said = []
            for expert, reader in enumerate(self._readers[row]):
                logits_TV = reader.read(prompt)
                self.buffers.logits_ERV[expert, row] = logits_TV[-1]
                said.append(said_of(logits_TV, torch.tensor([*prompt[1:], 0], device=logits_TV.device)))
        logp_ET, entropy_ET = (torch.stack(values).double().cpu() for values in zip(*said, strict=True))
        return ReadPrompt(logp_ET[:, :-1], entropy_ET)

    def read_on(self, rows: Sequence[int], experts: Sequence[int], longest: int) -> None:  # noqa: ARG002
        tokens = self.buffers.tokens_R.tolist()
        for row in rows:
            for expert in experts:
                self.buffers.logits_ERV[expert, row] = self._readers[row][expert].read([tokens[row]])[-1]

    def forget(self, row: int) -> None:
        self._readers.pop(row, None)


@torch.inference_mode()
def reads_on_as_it_scores(model: PreTrainedModel, block_tokens: int) -> bool:
    """Whether a model that goes on from what it keeps predicts as one that reads a block at once.

    Not so where rotary frequencies depend on the length of what is read at once (longrope), nor where a
    version of transformers counts positions from zero again (Bamba, in 5.24). A made-up block is read to its
    first token and nearly to its end, and then on.
    """
    block_1T = random_block(model.config.vocab_size, block_tokens).to(model.device)
    at_once_TV = logits_of(model, block_1T, type(model).__name__)[0]
    for first in beginnings(block_tokens):
        reader, tokens = Reader(model.eval()), block_1T[0].tolist()
        last = min(first + 2, block_tokens)
        said_TV = torch.cat([reader.read(tokens[:first]), *(reader.read([t]) for t in tokens[first:last])])
        if not are_alike(said_TV, at_once_TV[:last]):
            return False
    return True


def beginnings(block_tokens: int) -> list[int]:
    """Numbers of tokens after which reading on is tried: one, and nearly a block."""
    return sorted({min(1, block_tokens), max(1, block_tokens - 2)})


def are_alike(one_TV: torch.Tensor, other_TV: torch.Tensor) -> bool:
    """Whether logits mean the same predictions, but for rounding."""
    tolerance = LARGEST_DIFFERENCE.get(one_TV.dtype, _LARGEST_ROUGH_DIFFERENCE)
    one_TV, other_TV = (torch.log_softmax(logits_TV.float(), dim=-1) for logits_TV in (one_TV, other_TV))
    return torch.allclose(one_TV, other_TV, rtol=0, atol=tolerance)
