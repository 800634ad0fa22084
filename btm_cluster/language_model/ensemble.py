"""A forest as one language model: its experts read side by side, and their predictions are mixed by the posterior or a gate.

    p(x_t | x_<t) = Σ_j p_j(x_t | x_<t) · p(D=j | x_<t)                     paper, equation 1

E experts, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import CausalLMOutputWithPast

from btm_cluster.equations.gates import Gate
from btm_cluster.language_model.model import logits_of, made_up_block

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the keys and values that it keeps: the second in 5.17, the first in 5.24."""
_LARGEST_DIFFERENCE = 1e-3
"""Nats between log-probabilities that are the same but for rounding."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the likeliest that together reach `top_p`, flattened or sharpened by `temperature`."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    random_seed: int = 0


@dataclass
class _Reader:
    """An expert and what it keeps of what it has read."""

    model: PreTrainedModel
    block_tokens: int | None = None
    """Where given, it keeps nothing, and reads as much at once as scoring does: what was read, filled up to a block."""
    cache: Any = None
    read: list[int] = field(default_factory=list)

    def go_on(self, tokens: Sequence[int]) -> torch.Tensor:
        """log p_j of the token after each of these: float64 [tokens, V]."""
        self.read += tokens
        if self.block_tokens is not None:
            filled = self.read + [0] * (self.block_tokens - len(self.read))
            said_1TV = self.model(input_ids=torch.tensor([filled], device=self.model.device), use_cache=False).logits
            return _log_probs(said_1TV[0, len(self.read) - len(tokens) : len(self.read)])
        if self.cache is None:  # at the beginning; a model that keeps no cache reads everything again
            return self._ask(self.read)[-len(tokens) :]
        # One by one: Mamba and Jamba compute several tokens that continue a cache from an empty state.
        return torch.cat([self._ask([token]) for token in tokens])

    def _ask(self, tokens: Sequence[int]) -> torch.Tensor:
        fresh = torch.tensor([tokens], device=self.model.device)
        said = self.model(input_ids=fresh, use_cache=True, **{CACHE: self.cache})
        self.cache = getattr(said, CACHE, None)
        return _log_probs(said.logits[0])


@torch.inference_mode()
def reads_on_as_it_scores(model: PreTrainedModel, block_tokens: int) -> bool:
    """Whether a model that goes on from what it keeps predicts as one that reads a block at once.

    Not so where rotary frequencies depend on the length of what is read at once (longrope), nor where a version of
    transformers counts positions from zero again (Bamba, in 5.24). A made-up block is read to its first token and nearly to
    its end, and then on.
    """
    block_1T = made_up_block(model.config.vocab_size, block_tokens).to(model.device)
    at_once_TV = _log_probs(logits_of(model, block_1T, type(model).__name__)[0])
    for first in {min(1, block_tokens), max(1, block_tokens - 2)}:
        reader, tokens = _Reader(model.eval()), block_1T[0].tolist()
        last = min(first + 2, block_tokens)
        said_TV = torch.cat([reader.go_on(tokens[:first]), *(reader.go_on([t]) for t in tokens[first:last])])
        if not torch.allclose(said_TV, at_once_TV[:last], rtol=0, atol=_LARGEST_DIFFERENCE):
            return False
    return True


class Ensemble:
    """Experts and a gate, which a posterior with its prior is too, reading one text from its beginning. The text is at most a
    block long."""

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        gate: Gate,
        first_token: int,
        text: Sequence[int] = (),
        block_tokens: int | None = None,
    ) -> None:
        """Reads the tokenizer's first token and a text, in one pass.

        With `block_tokens`, for models that do not read on as they score: they read a block anew for every token.
        """
        self._readers = [_Reader(model.eval(), block_tokens) for model in models]
        self._gate = gate
        self._logp_ET = self._entropy_ET = torch.zeros(len(models), 0, dtype=torch.float64)
        self._take_in(text, self._go_on([first_token, *text]))

    def log_weights(self) -> torch.Tensor:
        """log p(D=j | what was read): [E]."""
        return self._log_weights_E

    def log_probs(self) -> torch.Tensor:
        """log p of every next token: [V]."""
        return torch.logsumexp(self._log_weights_E[:, None] + self._next_EV, dim=0)

    def read(self, tokens: Sequence[int]) -> None:
        """Goes on by these tokens."""
        if not tokens:
            return
        fresh_ETV = self._go_on(tokens)
        self._entropy_ET = self._entropy_ET[:, :-1]  # of the prediction before these, which is taken in again
        self._take_in(tokens, torch.cat([self._next_EV[:, None], fresh_ETV], dim=1))

    def _take_in(self, tokens: Sequence[int], said_ETV: torch.Tensor) -> None:
        """Notes how well each token was predicted. The predictions are of these tokens and of the one after them."""
        seen_T = torch.tensor(list(tokens), dtype=torch.int64)
        seen_ET = said_ETV[:, :-1].gather(2, seen_T.expand(len(said_ETV), -1)[..., None])[..., 0]
        self._logp_ET = torch.cat([self._logp_ET, seen_ET], dim=1)
        self._entropy_ET = torch.cat([self._entropy_ET, _entropies(said_ETV)], dim=1)
        self._next_EV = said_ETV[:, -1]
        self._log_weights_E = self._weigh()

    def write(self, most_tokens: int, end_of_text: int, vocabulary: int, sampling: Sampling) -> Iterator[int]:
        """Draws tokens, below `vocabulary`, until end of text or `most_tokens`; yields each before it is read."""
        generator = torch.Generator().manual_seed(sampling.random_seed)
        for left in reversed(range(most_tokens)):
            token = _draw(self.log_probs()[:vocabulary], sampling, generator)
            if token == end_of_text:
                return
            yield token
            if left:  # the last of a full block has a place where no model reads
                self.read([token])

    def _weigh(self) -> torch.Tensor:
        unseen_E1 = torch.zeros(len(self._readers), 1, dtype=torch.float64)
        logp_EBT = torch.cat([self._logp_ET, unseen_E1], dim=1)[:, None]
        log_weights_EBT = self._gate.log_weights(logp_EBT, self._entropy_ET[:, None])
        return log_weights_EBT[:, 0, -1]

    @torch.inference_mode()
    def _go_on(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.stack([reader.go_on(tokens) for reader in self._readers])


def _log_probs(logits_TV: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits_TV.float(), dim=-1).double().cpu()


def _entropies(log_probs_ETV: torch.Tensor) -> torch.Tensor:
    """In nats: [E, T]. One expert after the other, since a long prompt's predictions are gigabytes."""
    return torch.stack([torch.special.entr(said_TV.exp()).sum(-1) for said_TV in log_probs_ETV])


def _draw(log_probs_V: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(log_probs_V.argmax())
    scores_1V = TemperatureLogitsWarper(sampling.temperature)(None, log_probs_V[None])
    scores_1V = TopPLogitsWarper(sampling.top_p)(None, scores_1V)
    return int(torch.multinomial(torch.softmax(scores_1V[0], dim=0), 1, generator=generator))
