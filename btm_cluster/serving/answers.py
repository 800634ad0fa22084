"""From what an engine wrote and scored to the choices of a completion."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.language_model.ensemble_scoring import TextScores
from btm_cluster.language_model.prompts import Drawn, Pieces, Written
from btm_cluster.serving.completions import FINISH_REASONS, Choice, CompletionRequest, Logprobs
from btm_cluster.serving.engine_thread import Continuation
from btm_cluster.serving.forest import Served


@dataclass(frozen=True)
class ReadText:
    """A prompt as token ids."""

    tokens: list[int]
    """Without the token that every text is read after."""
    has_first_token: bool
    """Whether that token stood before them: it then has a place in the answer, as it has in the prompt."""


def read_prompt(prompt: str | list[int], tokenizer: TextTokenizer) -> ReadText:
    """A prompt's token ids. A prompt of ids may begin with the tokenizer's first token, as other tools have it;
    a text never does."""
    if isinstance(prompt, str):
        return ReadText(tokenizer.encode(prompt), False)
    begins = prompt[0] == tokenizer.first_token
    return ReadText(prompt[1:] if begins else prompt, begins)


def choice_of(
    index: int,
    request: CompletionRequest,
    read: ReadText,
    scores: TextScores | None,
    written: Written | None,
    served: Served,
    tokenizer: TextTokenizer,
) -> Choice:
    """One text: the prompt where it is echoed, and what was written after it."""
    logprobs = Logprobs() if request.logprobs is not None else None
    text = ""
    if request.echo:
        text = tokenizer.decode(read.tokens)
        if read.has_first_token:
            text = tokenizer.name(tokenizer.first_token) + text
        if logprobs is not None and scores is not None:
            _add_scored(logprobs, read, scores, tokenizer)
    if written is not None and logprobs is not None:
        _add_written(logprobs, read, written, request.logprobs or 0, len(text), tokenizer)
    if written is not None:
        text += written.text or ""
    finish = "length" if written is None or written.finish is None else FINISH_REASONS[written.finish]
    return Choice(
        index=index,
        text=text,
        logprobs=logprobs,
        finish_reason=finish,
        experts=_mean_weights(written, scores, served),
    )


def _mean_weights(
    written: Written | None, scores: TextScores | None, served: Served
) -> dict[str, float] | None:
    if written is not None and written.drawn:
        weights = written.mean_weights(len(served.names))
    elif scores is not None and scores.log_weights_ET.shape[1]:
        weights = scores.log_weights_ET.exp().mean(1).tolist()
    else:
        return None
    return dict(zip(served.names, weights, strict=True))


def _add_scored(logprobs: Logprobs, read: ReadText, scores: TextScores, tokenizer: TextTokenizer) -> None:
    offset = 0
    if read.has_first_token:
        name = tokenizer.name(tokenizer.first_token)
        logprobs.add(name, None, None, 0)
        offset = len(name)
    text = Pieces([], tokenizer.decode_continuation)
    places = zip(
        read.tokens,
        scores.logp_T.tolist(),
        scores.alternatives_TK.tolist(),
        scores.alternative_logp_TK.tolist(),
        strict=True,
    )
    before: list[int] = []
    for token, logp, ids, logps in places:
        piece = text.add(token)
        top = _top(before, token, piece, logp, list(zip(ids, logps, strict=True)), tokenizer)
        logprobs.add(piece, logp, top, offset)
        offset += len(piece)
        before = [*before[-_BEFORE:], token]


_BEFORE = 8
"""Tokens before a token by which its text is told."""


def _top(
    before: Sequence[int],
    token: int,
    piece: str,
    logp: float,
    alternatives: Sequence[tuple[int, float]],
    tokenizer: TextTokenizer,
) -> dict[str, float] | None:
    """The likeliest tokens by their text, the token itself among them: with the same number as beside it."""
    if not alternatives:
        return None
    top: dict[str, float] = {}
    for other, value in alternatives:
        if other != token:
            top.setdefault(tokenizer.decode_continuation(before, [other]), value)
    return {piece: logp, **{text: value for text, value in top.items() if text != piece}}


def _add_written(
    logprobs: Logprobs,
    read: ReadText,
    written: Written,
    alternatives: int,
    offset: int,
    tokenizer: TextTokenizer,
) -> None:
    stream = WrittenText(read, alternatives, offset, tokenizer)
    for drawn in written.drawn:
        stream.add(drawn, logprobs)


class WrittenText:
    """The text of a continuation, token by token, with log-probabilities where they are wanted."""

    def __init__(self, read: ReadText, alternatives: int, offset: int, tokenizer: TextTokenizer) -> None:
        self._alternatives, self._offset, self._tokenizer = alternatives, offset, tokenizer
        self._before = read.tokens[-_BEFORE:]
        self._pieces = Pieces(read.tokens, tokenizer.decode_continuation)

    def add(self, drawn: Drawn, logprobs: Logprobs | None) -> str:
        """One token's part of the text."""
        piece = self._pieces.add(drawn.token)
        if logprobs is not None:
            likeliest = drawn.alternatives[: self._alternatives]
            top = _top(self._before, drawn.token, piece, drawn.logp, likeliest, self._tokenizer)
            logprobs.add(piece, drawn.logp, top, self._offset)
        self._before = [*self._before[-_BEFORE:], drawn.token]
        self._offset += len(piece)
        return piece


async def streamed(
    index: int,
    request: CompletionRequest,
    read: ReadText,
    continuation: Continuation,
    served: Served,
    tokenizer: TextTokenizer,
) -> AsyncIterator[Choice]:
    """A choice in parts, the last with its end. Text that may become a stop string is held back."""
    text = WrittenText(read, request.logprobs or 0, 0, tokenizer)
    most_held = max((len(stop) - 1 for stop in request.stops), default=0)
    told, whole = 0, ""
    async for one in continuation.tokens():
        logprobs = Logprobs() if request.logprobs is not None else None
        if isinstance(one, Written):
            rest = (one.text or "")[told:]
            finish = FINISH_REASONS[one.finish] if one.finish is not None else None
            yield Choice(
                index=index, text=rest, finish_reason=finish, experts=_mean_weights(one, None, served)
            )
            return
        whole += text.add(one, logprobs)
        if one.finish is None:
            part = whole[told : max(told, len(whole) - most_held)]
            told += len(part)
            yield Choice(index=index, text=part, logprobs=logprobs)
        elif logprobs is not None:
            yield Choice(index=index, text="", logprobs=logprobs)
