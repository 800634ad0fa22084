"""An engine for many callers: one thread steps it, and event loops wait for what it writes.

Between two steps it admits waiting prompts into free rows, scores texts that wait, and frees the rows of
callers who have gone.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from btm_cluster.equations.gates import Gate
from btm_cluster.errors import BusyError, ClosedError
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.ensemble_scoring import TextScores
from btm_cluster.language_model.prompts import Drawn, Prompt, Written

log = logging.getLogger(__name__)
SCORED_AT_ONCE = 8192
"""Tokens of texts that are scored between two steps, or one text: meanwhile nothing is written."""
STEPS_BETWEEN_PROMPTS = 8
"""Tokens that are written between two times of reading prompts, where anything is under way. Reading a few
prompts together takes less time than reading them one by one (docs/decisions/serving.md)."""
News: TypeAlias = Drawn | Written | BaseException


@dataclass(eq=False)
class Continuation:
    """A sequence that an engine writes for a caller in an event loop."""

    prompt: Prompt
    streams: bool
    """Whether each token is told, or only the end."""
    loop: asyncio.AbstractEventLoop
    news: "asyncio.Queue[News]" = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False
    told: int = 0
    """Tokens that the caller has got."""

    async def tokens(self) -> AsyncIterator[Drawn | Written]:
        """Each token as it is drawn, where that is wanted, and at last all that was written."""
        while True:
            one = await self.news.get()
            if isinstance(one, BaseException):
                raise one
            self.told += isinstance(one, Drawn)
            yield one
            if isinstance(one, Written):
                return

    async def written(self) -> Written:
        """All that was written, once it has ended."""
        async for one in self.tokens():
            if isinstance(one, Written):
                return one
        raise AssertionError("a continuation ends with what was written")


@dataclass(eq=False)
class _Scoring:
    text: Sequence[int]
    gate: Gate | None
    alternatives: int
    loop: asyncio.AbstractEventLoop
    found: "asyncio.Future[TextScores]"

    def goes_with(self, other: "_Scoring") -> bool:
        """Whether one pass serves both."""
        return self.gate is other.gate and self.alternatives == other.alternatives


class EngineThread:
    """An engine and the thread that steps it. All methods may be called from any thread."""

    def __init__(self, engine: EnsembleEngine, most_waiting: int) -> None:
        """At most `most_waiting` prompts and texts wait beside those that are under way."""
        self.engine = engine
        self._most_waiting = most_waiting
        self._wake = threading.Condition()
        self._prompts: deque[Continuation] = deque()
        self._texts: deque[_Scoring] = deque()
        self._rows: dict[int, Continuation] = {}
        self._steps = 0
        """Since prompts were read."""
        self._is_closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Prompts and texts that wait."""
        return len(self._prompts) + len(self._texts)

    @property
    def under_way(self) -> int:
        """Sequences that are being written."""
        return len(self._rows)

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the thread, if any."""
        return self._failure

    def write(self, prompts: Sequence[Prompt], streams: bool = False) -> list[Continuation]:
        """Queues prompts, all or none, for a caller in the running event loop.

        Raises:
            UserError: a prompt that cannot be continued as asked.
            BusyError: there is no room for them.
            ClosedError: the engine has ended.
        """
        for prompt in prompts:
            self.engine.check(prompt)
        loop = asyncio.get_running_loop()
        asked = [Continuation(prompt, streams, loop) for prompt in prompts]
        self._queue(lambda: self._prompts.extend(asked), len(asked))
        return asked

    async def score(
        self, texts: Sequence[Sequence[int]], gate: Gate | None = None, alternatives: int = 0
    ) -> list[TextScores]:
        """As an engine scores texts, all or none.

        Raises:
            UserError: a text longer than a block, or with unknown token ids.
            BusyError: there is no room for them.
            ClosedError: the engine has ended.
        """
        for text in texts:
            self.engine.check_text(text)
        loop = asyncio.get_running_loop()
        asked = [_Scoring(text, gate, alternatives, loop, loop.create_future()) for text in texts]
        self._queue(lambda: self._texts.extend(asked), len(asked))
        try:
            return list(await asyncio.gather(*(one.found for one in asked)))
        finally:
            for one in asked:
                one.found.cancel()

    def cancel(self, continuations: Sequence[Continuation]) -> None:
        """Ends continuations whose caller has gone; finished ones stay as they are."""
        with self._wake:
            for one in continuations:
                one.is_cancelled = True
            self._wake.notify()

    def close(self) -> None:
        """Takes nothing more; what waits and what is under way is finished first."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until the thread has ended."""
        self._thread.join(timeout_s)

    def _queue(self, add: Callable[[], object], count: int) -> None:
        with self._wake:
            if self._is_closing or self._failure is not None:
                raise ClosedError("this engine takes no more", found=str(self._failure or "it is ending"))
            if self.waiting + count > self._most_waiting + self.engine.free_rows:
                raise BusyError(
                    "too many requests wait",
                    found=f"{self.waiting} prompts and texts, and {count} more",
                    expected=f"at most {self._most_waiting}",
                    remedy="try again later",
                )
            add()
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._release_cancelled()
                self._admit()
                self._score()
                self._step()
        except BaseException as exc:
            log.exception("the engine has failed")
            with self._wake:
                self._failure = exc
            self._fail([*self._rows.values(), *self._prompts, *self._texts], exc)

    def _wait_for_work(self) -> bool:
        """Whether there is some, or none will come any more."""
        with self._wake:
            while not (self._rows or self._prompts or self._texts):
                if self._is_closing:
                    return False
                self._wake.wait()
            return True

    def _release_cancelled(self) -> None:
        for row in [row for row, one in self._rows.items() if one.is_cancelled]:
            self.engine.release(row)
            del self._rows[row]

    def _admit(self) -> None:
        if self._rows and self._steps < STEPS_BETWEEN_PROMPTS:
            return
        with self._wake:
            waiting = [one for one in self._prompts if not one.is_cancelled]
            taken = waiting[: self.engine.free_rows]
            self._prompts = deque(waiting[len(taken) :])
        if taken:
            self._steps = 0
            self._read_in(taken)

    def _read_in(self, taken: Sequence[Continuation]) -> None:
        """Together or, where that fails, one by one: such as a prompt too many for the device's memory."""
        try:
            rows = self.engine.admit([one.prompt for one in taken])
        except Exception as exc:
            if len(taken) == 1:
                self._fail(taken, exc)
                return
            for one in taken:
                self._read_in([one])
        else:
            self._rows |= dict(zip(rows, taken, strict=True))

    def _score(self) -> None:
        with self._wake:
            waiting = [one for one in self._texts if not one.found.cancelled()]
            taken = _first_pass(waiting)
            self._texts = deque(one for one in waiting if one not in taken)
        if not taken:
            return
        self._score_all(taken)

    def _score_all(self, taken: Sequence[_Scoring]) -> None:
        try:
            scores = self.engine.score([one.text for one in taken], taken[0].gate, taken[0].alternatives)
        except Exception as exc:
            if len(taken) == 1:
                self._fail(taken, exc)
                return
            for one in taken:
                self._score_all([one])
        else:
            for one, found in zip(taken, scores, strict=True):
                _tell(one.loop, _settle, one.found, found)

    def _step(self) -> None:
        self._steps += 1
        for row, drawn in self.engine.step().items():
            one = self._rows[row]
            if one.streams and drawn.is_written:
                _tell(one.loop, one.news.put_nowait, drawn)
            if drawn.finish is not None:
                del self._rows[row]
                _tell(one.loop, one.news.put_nowait, self.engine.release(row))

    def _fail(self, asked: Sequence[Continuation | _Scoring], exc: BaseException) -> None:
        for one in asked:
            if isinstance(one, Continuation):
                _tell(one.loop, one.news.put_nowait, exc)
            else:
                _tell(one.loop, _settle, one.found, exc)


def _first_pass(waiting: Sequence[_Scoring]) -> list[_Scoring]:
    """Those that are scored next: like the first, and together not too long."""
    taken: list[_Scoring] = []
    tokens = 0
    for one in waiting:
        if one.goes_with(waiting[0]) and (not taken or tokens + len(one.text) <= SCORED_AT_ONCE):
            taken.append(one)
            tokens += len(one.text)
    return taken


def _settle(future: "asyncio.Future[TextScores]", found: TextScores | BaseException) -> None:
    if future.done():
        return
    if isinstance(found, BaseException):
        future.set_exception(found)
    else:
        future.set_result(found)


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the caller's loop has ended
        log.debug("a caller has gone")
