"""OpenAI's completions API as far as a mixture of base models has it: what is
asked, and what is answered."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from btm_cluster.language_model.prompts import Finish, Prompt
from btm_cluster.language_model.sampling import Sampling


def _text(given: object) -> bool:
    """Whether it is a text that a tokenizer reads. JSON can name half a character, a lone surrogate."""
    return isinstance(given, str) and given.encode(errors="replace").decode() == given


def _ids(given: object) -> bool:
    return isinstance(given, list) and given != [] and all(type(token) is int for token in given)


def _check_prompt(given: object) -> object:
    several = given if isinstance(given, list) and given else [given]
    if _ids(given) or all(map(_text, several)) or all(map(_ids, several)):
        return given
    raise ValueError("expected a text of whole characters, a list of token ids, or a list of either")


def _check_texts(given: object) -> object:
    if all(map(_text, given if isinstance(given, list) else [given])):
        return given
    raise ValueError("expected a text, or a list of texts, of whole characters")


Prompts = Annotated[
    str | list[int] | list[str] | list[list[int]],
    PlainValidator(_check_prompt, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
]
Texts = Annotated[str | list[str], PlainValidator(_check_texts, json_schema_input_type=str | list[str])]
FINISH_REASONS: dict[Finish, str] = {
    "end of text": "stop",
    "stop": "stop",
    "tokens": "length",
    "block": "length",
}
"""OpenAI's words for why a text ended."""
MOST_STOPS = 64


class StreamOptions(BaseModel):
    """Options of a stream beside its text."""

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of `POST /v1/completions`. Unknown fields are refused: they would change nothing in silence."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: Prompts = ""
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    best_of: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    stop: Texts | None = None
    seed: int | None = None
    user: str | None = None
    suffix: Literal[""] | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    top_k: int | None = Field(None, ge=1)
    """Draw from so many of the likeliest tokens. Not OpenAI's."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Not OpenAI's."""
    top_k_experts: int | None = Field(None, ge=1)
    """Let only the experts write that the prompt makes likeliest. Not OpenAI's."""
    draws_one_expert: bool = False
    """Let one expert write alone, drawn from the prompt's posterior: as exact, and refused where it is not.
    Not OpenAI's."""

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_for_null(cls, given: Any) -> Any:
        """As OpenAI's API does: some clients write `"max_tokens": null`."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be left out or equal n: texts are not chosen here")
        if self.echo and self.stream:
            raise ValueError("echo cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 writes nothing: it scores a prompt, with echo and logprobs")
        if "" in self.stops:
            raise ValueError("a stop string is empty")
        if len(self.stops) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} stop strings are looked for after each token")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(given)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]

    def asked(self, tokens: list[int], random_seed: int) -> Prompt:
        """One prompt for an engine, with as many tokens as are asked for."""
        sampling = Sampling(self.temperature, self.top_p, random_seed, self.top_k, self.repetition_penalty)
        return Prompt(
            tokens,
            self.max_tokens,
            sampling,
            stop=self.stops,
            top_k_experts=self.top_k_experts,
            draws_one_expert=self.draws_one_expert,
            alternatives=self.logprobs or 0,
        )


class Logprobs(BaseModel):
    """Log-probabilities of a choice's tokens, before temperature and filters; nothing is known of the first
    token where it is the one that every text is read after."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def add(self, text: str, logp: float | None, top: dict[str, float] | None, offset: int) -> None:
        """One token more."""
        self.tokens.append(text)
        self.token_logprobs.append(logp)
        self.top_logprobs.append(top)
        self.text_offset.append(offset)


class Choice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    experts: dict[str, float] | None = None
    """Each expert's mean weight over the tokens that were written, or scored where none was. Not OpenAI's."""


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer, or one part of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """The forest's version."""
    choices: list[Choice]
    usage: Usage | None = None


class DomainsRequest(BaseModel):
    """The body of `POST /v1/domains`."""

    model_config = ConfigDict(extra="forbid")
    input: Texts


class DomainsOfText(BaseModel):
    """One text's domain posterior, by Bayes' rule on all of its tokens with a uniform prior."""

    index: int
    domains: dict[str, float]
    tokens: int
    nats_per_token: dict[str, float]
    """Each expert's mean loss, and the ensemble's."""
