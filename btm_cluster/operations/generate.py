"""`btm generate`: the whole forest writes on, its models weighted as the
posterior or the gate says, token after token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.driver.driver import Driver
from btm_cluster.errors import UserError
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.prompts import Finish, Prompt, Written, check_length, pieces
from btm_cluster.language_model.sampling import Sampling, check_sampling
from btm_cluster.ledger import Ledger
from btm_cluster.operations.ensemble import mixture_of_plan
from btm_cluster.plan import Plan
from btm_cluster.steps.mixture import Mixture, mixture_of_store, open_engine
from btm_cluster.steps.stored import open_tokenizer

PROMPTS_AT_ONCE = 8
"""Prompts that are written on together: each takes memory for a block's keys and values in every expert."""


@dataclass(frozen=True)
class Continuation:
    """How prompts are written on."""

    most_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""


@dataclass(frozen=True)
class Piece:
    """A token's part of a text, and the expert from which most of the token's probability came."""

    text: str
    """Empty for a token that ends within a character: the character stands at its last token."""
    expert: str
    share: float
    """The expert's share of the token's probability."""


@dataclass(frozen=True)
class Generated:
    """Text that a forest wrote after a prompt, and the weights of its experts."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    finish: Finish
    """Why it ended."""
    expert_weights: Mapping[str, float]
    """The mean weight over the written tokens, by domain, and the seed's; what
    the plan's `top_k` leaves out is missing, or zero where it was loaded."""
    pieces: tuple[Piece, ...]


def check_generate_call(asked: Continuation) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    if asked.most_tokens < 1:
        found = str(asked.most_tokens)
        raise UserError("the number of new tokens is too small", found=found, expected="at least 1")
    if "" in asked.stop:
        raise UserError("a stop string is empty", expected="characters before which the text ends")
    check_sampling(asked.sampling)


def generate(
    plan: Plan, target: str | None, prompts: Sequence[str], asked: Continuation, driver: Driver
) -> list[Generated]:
    """Continues each prompt, until end of text, a stop string, as many tokens as asked for, or a full block.

    The experts are mixed as the plan's `merging` says, with what was fitted for the text `target`; without
    one, as for a text of which nothing is known. They are loaded into this process, and run on its GPU where
    it has one. Each prompt has random numbers of its own.

    Raises:
        UserError: no forest yet, a target that is unknown or was taken out of it, or a prompt that fills a
        block.
    """
    return _generate(mixture_of_plan(plan, driver, target).without_ruled_out(), prompts, asked, driver.ledger)


def generate_from_store(ledger: Ledger, prompts: Sequence[str], asked: Continuation) -> list[Generated]:
    """Continues each prompt by the newest forest of a store, mixed by the paper's posterior.

    Raises:
        UserError: there is no forest in the store, it has no expert, or a prompt fills a block.
    """
    return _generate(mixture_of_store(ledger), prompts, asked, ledger)


def _generate(
    mixture: Mixture, prompts: Sequence[str], asked: Continuation, ledger: Ledger
) -> list[Generated]:
    tokenizer = open_tokenizer(ledger, mixture.tokenizer)
    read_prompts(prompts, tokenizer, mixture.block_tokens)  # refused before a model is loaded
    engine = open_engine(ledger, mixture, tokenizer, min(len(prompts), PROMPTS_AT_ONCE))
    return continue_prompts(engine, tokenizer, list(mixture.models), prompts, asked)


def continue_prompts(
    engine: EnsembleEngine,
    tokenizer: TextTokenizer,
    names: Sequence[str],
    prompts: Sequence[str],
    asked: Continuation,
) -> list[Generated]:
    """Continues each prompt by an engine whose models are called `names`.

    Raises:
        UserError: a call that cannot be met, or a prompt that fills a block.
    """
    check_generate_call(asked)
    read = read_prompts(prompts, tokenizer, engine.settings.block_tokens)
    written = engine.generate(
        [Prompt(ids, asked.most_tokens, asked.sampling, i, asked.stop) for i, ids in enumerate(read)]
    )
    return [
        _generated(prompt, ids, one, names, tokenizer)
        for prompt, ids, one in zip(prompts, read, written, strict=True)
    ]


def read_prompts(prompts: Sequence[str], tokenizer: TextTokenizer, block_tokens: int) -> list[list[int]]:
    """The prompts' token ids.

    Raises:
        UserError: a prompt that leaves no room in a block; of several, with its number.
    """
    read = [tokenizer.encode(prompt) for prompt in prompts]
    for number, ids in enumerate(read):
        check_length(
            ids,
            block_tokens - 1,
            block_tokens,
            "the prompt" if len(read) == 1 else f"prompt {number + 1} of {len(read)}",
        )
    return read


def _generated(
    prompt: str, read: Sequence[int], written: Written, names: Sequence[str], tokenizer: TextTokenizer
) -> Generated:
    assert written.text is not None, "the engine has a tokenizer"
    assert written.finish is not None
    told: list[Piece] = []
    left = len(written.text)  # less than the tokens' text where a stop string ended it
    for text, drawn in zip(
        pieces(read, written.tokens, tokenizer.decode_continuation), written.drawn, strict=True
    ):
        best = max(range(len(names)), key=lambda j: drawn.shares_E[j])
        told.append(Piece(text[:left], names[best], drawn.shares_E[best]))
        left -= len(told[-1].text)
    weights = dict(zip(names, written.mean_weights(len(names)), strict=True))
    return Generated(
        prompt, written.text, len(read), len(written.tokens), written.finish, weights, tuple(told)
    )
