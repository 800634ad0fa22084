"""Prompts of an engine, and the texts that it wrote. Knows no models and no device.

E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from btm_cluster.equations.gates import Gate
from btm_cluster.errors import UserError
from btm_cluster.language_model.sampling import Sampling, check_sampling

MOST_ALTERNATIVES = 20
"""Other tokens of which a log-probability can be had at each place."""
_PLAIN = Sampling()
_TOKENS_BEYOND = 8
"""Tokens that are looked at beyond a stop string's number of bytes, since a few
stand for no byte; and before a token's text."""
_HALF_A_CHARACTER = "\ufffd"
"""Replacement character, which tokens decode to that end within a character."""

Finish = Literal["end of text", "stop", "tokens", "block"]
"""Why a sequence ended: the end-of-text token, a stop string, as many tokens
as were asked for, or a full block."""


@dataclass(frozen=True)
class Prompt:
    """A text to be continued, and how."""

    tokens: Sequence[int]
    """Without the tokenizer's first token."""
    most_tokens: int
    sampling: Sampling = _PLAIN
    sample: int = 0
    """Which of several continuations by the same random seed."""
    stop: tuple[str, ...] = ()
    """Strings that end it; the text then ends before them."""
    gate: Gate | None = None
    """How experts are weighed; by default as the engine weighs them.

    Of the same form as the engine's, with other numbers.
    """
    experts: Sequence[int] | None = None
    """Only these write; their weights then sum to one."""
    top_k_experts: int | None = None
    """Only so many experts write: those with most weight once the prompt is read.

    The others' weights are shared out.
    """
    draws_one_expert: bool = False
    """One expert, drawn from the prompt's posterior, writes alone. Under the full posterior at temperature 1,
    and with every token allowed, texts have the same probabilities as if all wrote together: a product of
    mixtures weighed by Bayes' rule is a mixture of products. Where models know more tokens than the
    tokenizer, up to the probability of those."""
    alternatives: int = 0
    """The likeliest tokens whose log-probabilities are wanted at each place."""

    def samples(self, count: int) -> list["Prompt"]:
        """Several continuations, each by random numbers of its own."""
        return [replace(self, sample=sample) for sample in range(count)]


@dataclass(frozen=True)
class Drawn:
    """One token of a sequence."""

    token: int
    logp: float
    """Log-probability under the mixture, before temperature, penalty, top-k and top-p."""
    weights_E: Sequence[float]
    """p(D=j | x_<t), by which experts were mixed for it."""
    shares_E: Sequence[float]
    """p(D=j | x_≤t) by Bayes' rule: how much of the token's probability came from each expert."""
    alternatives: Sequence[tuple[int, float]] = ()
    """The likeliest tokens with their log-probabilities, the likeliest first."""
    finish: Finish | None = None

    @property
    def is_written(self) -> bool:
        """Whether the token is a part of the text: one that ends the text is not."""
        return self.finish != "end of text"


@dataclass
class Written:
    """A continuation so far. An end-of-text token is not part of it."""

    tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    text: str | None = None
    """Up to a stop string; None where the engine has no tokenizer."""
    finish: Finish | None = None

    def mean_weights(self, experts: int) -> list[float]:
        """Each expert's weight, mean over the tokens: [E]."""
        count = max(1, len(self.drawn))
        return [math.fsum(one.weights_E[j] for one in self.drawn) / count for j in range(experts)]


class Decode(Protocol):
    """A tokenizer's way back."""

    def __call__(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to `before`."""


def check_prompt(prompt: Prompt, block_tokens: int, vocabulary: int) -> None:
    """Refuses a prompt that cannot be continued as asked.

    Raises:
        UserError: saying why.
    """
    check_sampling(prompt.sampling)
    if prompt.most_tokens < 1:
        raise UserError("no token is asked for", found=str(prompt.most_tokens), expected="at least 1")
    check_length(prompt.tokens, block_tokens - 1, block_tokens)
    check_ids(prompt.tokens, vocabulary)
    if prompt.top_k_experts is not None and prompt.top_k_experts < 1:
        raise UserError("too few experts", found=str(prompt.top_k_experts), expected="at least 1")
    if not 0 <= prompt.alternatives <= MOST_ALTERNATIVES:
        found, expected = str(prompt.alternatives), f"0 to {MOST_ALTERNATIVES}"
        raise UserError("the number of alternatives is out of range", found=found, expected=expected)


def check_length(tokens: Sequence[int], most: int, block_tokens: int, what: str = "the prompt") -> None:
    """Refuses a text of more than `most` tokens; `what` names it.

    Raises:
        UserError: giving both numbers.
    """
    if len(tokens) > most:
        raise UserError(
            f"{what} is too long",
            found=f"{len(tokens)} tokens",
            expected=f"at most {most}: the forest reads no further back than a block of {block_tokens}",
            remedy="give its end alone",
        )


def check_ids(tokens: Sequence[int], vocabulary: int) -> None:
    """Refuses token ids that models do not know.

    Raises:
        UserError: naming one.
    """
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise UserError("an unknown token id", found=str(token), expected=f"0 to {vocabulary - 1}")


def ends_with_stop(prompt: Prompt, tokens: Sequence[int], decode: Decode) -> bool:
    """Whether a stop string is in the text of the newest tokens. Looks at as many as can hold one."""
    if not prompt.stop:
        return False
    looked_at = max(len(stop.encode()) for stop in prompt.stop) + _TOKENS_BEYOND
    before = [*prompt.tokens, *tokens[:-looked_at]][-looked_at:]
    newest = decode(before, tokens[-looked_at:])
    return any(stop in newest for stop in prompt.stop)


def text_before_stop(prompt: Prompt, tokens: Sequence[int], decode: Decode) -> str:
    """The continuation's text, up to the first stop string."""
    text = decode(prompt.tokens, tokens)
    found = [place for stop in prompt.stop if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


class Pieces:
    """The text of a continuation's tokens, one after the other.

    A character of several tokens stands at the last of them, and the others are empty.
    """

    def __init__(self, before: Sequence[int], decode: Decode) -> None:
        self._seen, self._decode = list(before[-_TOKENS_BEYOND:]), decode
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is whole with one token more."""
        self._held.append(token)
        text = self._decode(self._seen, self._held)
        if text.endswith(_HALF_A_CHARACTER):
            return ""
        self._seen, self._held = [*self._seen, *self._held][-_TOKENS_BEYOND:], []
        return text

    def rest(self) -> str:
        """The beginning of a character whose other tokens never came; empty where there is none."""
        return self._decode(self._seen, self._held) if self._held else ""


def pieces(before: Sequence[int], tokens: Sequence[int], decode: Decode) -> list[str]:
    """Each token's part of the continuation."""
    text = Pieces(before, decode)
    found = [text.add(token) for token in tokens]
    if rest := text.rest():
        found[-1] = rest
    return found
