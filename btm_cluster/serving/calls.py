"""One call of the completions API: from its body to an answer, whole or in parts, on one forest version."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from btm_cluster.errors import UserError
from btm_cluster.language_model.ensemble_scoring import TextScores
from btm_cluster.serving.answers import ReadText, choice_of, read_prompt, streamed
from btm_cluster.serving.completions import Choice, Completion, CompletionRequest, Usage
from btm_cluster.serving.engine_thread import Continuation
from btm_cluster.serving.forest import LiveForest, LoadedForest, Served
from btm_cluster.serving.http_errors import GONE, as_error
from btm_cluster.serving.metrics import Metrics, Outcome

Result = TypeVar("Result")
CHARACTERS_PER_TOKEN = 128
"""No text has more in every token. A longer prompt is not read: while the tokenizer reads, nobody is answered."""


class CompletionCall:
    """One call of /v1/completions."""

    def __init__(self, live: LiveForest, body: CompletionRequest, request: Request, metrics: Metrics) -> None:
        self._live, self._body, self._request, self._metrics = live, body, request, metrics
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    async def answer(self) -> Completion:
        """The whole answer."""
        with self._live.current.in_use() as forest, self._metrics.call():
            call = self._answer(forest)
            return await within(self._live.settings.timeout_seconds, until_gone(self._request, call))

    async def _answer(self, forest: LoadedForest) -> Completion:
        body, tokenizer = self._body, forest.tokenizer
        read = await self._read(forest)
        served = await forest.model(body.model)
        continuations = self._start(served, read, False)
        try:
            scores = await self._scores(served, read)
            written = [await one.written() for one in continuations]
        finally:
            served.engine.cancel(continuations)
        choices = []
        for number, text in enumerate(read):
            for sample in range(body.n):
                index = number * body.n + sample
                said = written[index] if written else None
                choices.append(choice_of(index, body, text, scores[number], said, served, tokenizer))
        count = sum(len(one.drawn) for one in written)
        self._metrics.wrote(count)
        return self._completion(forest, choices, self._usage(read, count))

    async def stream(self) -> Response:
        """The answer in parts. What is wrong with the call is said before the first one."""
        with contextlib.ExitStack() as stack:
            forest = stack.enter_context(self._live.current.in_use())
            outcome = stack.enter_context(self._metrics.call())
            read = await self._read(forest)
            served = await forest.model(self._body.model)
            continuations = self._start(served, read, True)
            stack.callback(served.engine.cancel, continuations)
            parts = self._parts(forest, served, read, continuations, outcome)
            return _Stream(parts, stack.pop_all())

    async def _parts(
        self,
        forest: LoadedForest,
        served: Served,
        read: Sequence[ReadText],
        continuations: Sequence[Continuation],
        outcome: Outcome,
    ) -> AsyncIterator[str]:
        body, tokenizer = self._body, forest.tokenizer
        streams = [
            streamed(index, body, read[index // body.n], one, served, tokenizer)
            for index, one in enumerate(continuations)
        ]
        outcome.status = GONE  # unless the last part is read
        try:
            async with asyncio.timeout(self._live.settings.timeout_seconds):
                async for choice in _merged(streams):
                    yield _event(self._completion(forest, [choice], None))
        except Exception as exc:  # the status has been sent: the error is the last part
            outcome.status, error = as_error(exc)
            yield f"data: {json.dumps(error)}\n\n"
            return
        count = sum(one.told for one in continuations)
        self._metrics.wrote(count)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event(self._completion(forest, [], self._usage(read, count)))
        yield "data: [DONE]\n\n"
        outcome.status = 200

    async def _read(self, forest: LoadedForest) -> list[ReadText]:
        """The prompts' token ids.

        Raises:
            UserError: too many of them, or one that is far too long.
        """
        prompts, settings = self._body.prompts, self._live.settings
        most_texts = min(settings.prompts, settings.rows + settings.waiting)
        if len(prompts) * self._body.n > most_texts:
            raise UserError(
                "too many texts are asked for in one request",
                found=f"{len(prompts)} prompts, {self._body.n} of each",
                expected=f"at most {most_texts} texts",
                remedy="send several requests",
            )
        most = forest.mixture.block_tokens * CHARACTERS_PER_TOKEN
        for prompt in prompts:
            if len(prompt) > most:
                raise UserError(
                    "the prompt is too long",
                    found=f"{len(prompt):,} characters or token ids",
                    expected=f"a block of {forest.mixture.block_tokens} tokens at most",
                    remedy="give its end alone",
                )
        return await asyncio.to_thread(lambda: [read_prompt(one, forest.tokenizer) for one in prompts])

    def _start(self, served: Served, read: Sequence[ReadText], streams: bool) -> list[Continuation]:
        body = self._body
        if not body.max_tokens:
            return []
        random_seed = body.seed if body.seed is not None else secrets.randbits(63)
        asked = [text.tokens for text in read for _ in range(body.n)]
        prompts = [
            replace(served.prompt(body.asked(tokens, random_seed)), sample=index)
            for index, tokens in enumerate(asked)
        ]
        return served.engine.write(prompts, streams)

    async def _scores(self, served: Served, read: Sequence[ReadText]) -> list[TextScores | None]:
        """Scores of prompts that are echoed with log-probabilities, or whose weights alone are wanted."""
        body = self._body
        if not body.echo or (body.logprobs is None and body.max_tokens):
            return [None] * len(read)
        texts = [text.tokens for text in read]
        return list(await served.engine.score(texts, served.gate, body.logprobs or 0))

    def _usage(self, read: Sequence[ReadText], written: int) -> Usage:
        prompt = sum(len(text.tokens) + text.has_first_token for text in read)
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)

    def _completion(self, forest: LoadedForest, choices: list[Choice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._body.model,
            system_fingerprint=f"forest-version-{forest.mixture.version}",
            choices=choices,
            usage=usage,
        )


class _Stream(StreamingResponse):
    """Parts, and what is open for them until the last one is sent or the caller has gone: also where that is
    before the first."""

    def __init__(self, parts: AsyncIterator[str], held: contextlib.ExitStack) -> None:
        super().__init__(parts, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _merged(streams: Sequence[AsyncIterator[Choice]]) -> AsyncIterator[Choice]:
    """Parts of several choices, each as it comes."""
    queue: asyncio.Queue[Choice | BaseException | None] = asyncio.Queue()

    async def take(stream: AsyncIterator[Choice]) -> None:
        try:
            async for choice in stream:
                queue.put_nowait(choice)
            queue.put_nowait(None)
        except Exception as exc:
            queue.put_nowait(exc)

    tasks = [asyncio.create_task(take(stream)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            one = await queue.get()
            if one is None:
                left -= 1
            elif isinstance(one, BaseException):
                raise one
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()


async def within(seconds: float, work: Awaitable[Result]) -> Result:
    """The result, if it is there in time.

    Raises:
        TimeoutError: it is not; the work is cancelled.
    """
    async with asyncio.timeout(seconds):
        return await work


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result. If the caller hangs up first, the work is cancelled.

    Raises:
        ClientDisconnect: the caller has hung up.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(part: Completion) -> str:
    return f"data: {part.model_dump_json(exclude_none=False)}\n\n"
