"""An engine for many callers: who gets what, who is turned away, and what is left when a caller goes."""

import asyncio
import threading
from collections.abc import Iterator, Sequence

import pytest
from transformers import PreTrainedModel

from btm_cluster.errors import BusyError, ClosedError, UserError
from btm_cluster.language_model.engine import EnsembleEngine
from btm_cluster.language_model.engine_opening import EngineSettings
from btm_cluster.language_model.prompts import Drawn, Prompt, Written
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.serving.engine_thread import STEPS_BETWEEN_PROMPTS, EngineThread
from tests.unit.test_engine import BLOCK, FIRST, FULL, TEXT, VOCABULARY, made_up_model


@pytest.fixture(scope="module")
def experts() -> list[PreTrainedModel]:
    return [made_up_model(seed) for seed in range(3)]


def opened(experts: Sequence[PreTrainedModel], rows: int = 2) -> EnsembleEngine:
    return EnsembleEngine(experts, FULL, EngineSettings(FIRST, VOCABULARY, BLOCK, rows=rows))


@pytest.fixture
def thread(experts: list[PreTrainedModel]) -> Iterator[EngineThread]:
    """Two rows, and room for ten to wait."""
    thread = EngineThread(opened(experts), most_waiting=10)
    yield thread
    thread.close()
    thread.join(20)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(TEXT[: 1 + i % 5], 8, Sampling(random_seed=i)) for i in range(count)]


def test_more_prompts_than_rows_get_what_an_engine_alone_writes(
    thread: EngineThread, experts: list[PreTrainedModel]
) -> None:
    expected = [one.tokens for one in opened(experts).generate(prompts(12))]

    async def ask() -> list[list[int]]:
        asked = thread.write(prompts(12))
        return [(await one.written()).tokens for one in asked]

    assert asyncio.run(ask()) == expected


def test_a_stream_tells_each_token_and_then_all_of_them(thread: EngineThread) -> None:
    async def ask() -> tuple[list[int], Written]:
        (asked,) = thread.write(prompts(1), streams=True)
        told = [one async for one in asked.tokens()]
        assert isinstance(told[-1], Written)
        return [one.token for one in told if isinstance(one, Drawn)], told[-1]

    tokens, written = asyncio.run(ask())
    assert tokens == written.tokens
    assert len(tokens) == 8


def test_texts_are_scored_while_others_are_written(
    thread: EngineThread, experts: list[PreTrainedModel]
) -> None:
    (expected,) = opened(experts).score([TEXT[:9]])

    async def ask() -> list[float]:
        asked = thread.write(prompts(4))
        several = await asyncio.gather(*(thread.score([TEXT[:9]]) for _ in range(5)))
        await asyncio.gather(*(one.written() for one in asked))
        return [float(one.logp_T.sum()) for scores in several for one in scores]

    assert asyncio.run(ask()) == pytest.approx([float(expected.logp_T.sum())] * 5, abs=1e-5)


def test_where_as_many_wait_as_may_nobody_of_a_request_is_taken(thread: EngineThread) -> None:
    async def ask() -> None:
        with pytest.raises(BusyError, match="at most 10"):
            thread.write(prompts(13))
        asked = thread.write(prompts(12))  # two rows are free
        await asyncio.gather(*(one.written() for one in asked))

    asyncio.run(ask())


def test_a_prompt_that_cannot_be_continued_is_refused_before_it_waits(thread: EngineThread) -> None:
    async def ask() -> None:
        with pytest.raises(UserError, match="too long"):
            thread.write([Prompt(TEXT, 1)])
        with pytest.raises(UserError, match="unknown token"):
            await thread.score([[VOCABULARY]])

    asyncio.run(ask())
    assert not thread.waiting


def test_the_row_of_a_caller_who_has_gone_is_free_again(experts: list[PreTrainedModel]) -> None:
    engine = opened(experts, rows=1)
    step, may_go_on = engine.step, threading.Event()

    def slowly() -> dict[int, Drawn]:
        may_go_on.wait(20)
        return step()

    engine.step = slowly  # type: ignore[method-assign]
    thread = EngineThread(engine, most_waiting=10)

    async def ask() -> list[int]:
        gone, waits, stays = thread.write([*prompts(2), prompts(3)[2]])
        thread.cancel([gone, waits])
        may_go_on.set()
        written = (await stays.written()).tokens
        assert gone.news.empty()
        assert waits.news.empty()
        return written

    try:
        assert asyncio.run(ask()) == opened(experts).generate([prompts(3)[2]])[0].tokens
        assert engine.free_rows == 1
    finally:
        thread.close()
        thread.join(20)


def test_prompts_that_come_meanwhile_are_read_together_after_some_steps(
    experts: list[PreTrainedModel],
) -> None:
    engine = opened(experts, rows=4)
    admit, step, may_go_on, seen = engine.admit, engine.step, threading.Event(), list[str]()

    def noting_admit(asked: Sequence[Prompt]) -> list[int]:
        seen.append(f"{len(asked)} read")
        return admit(asked)

    def noting_step() -> dict[int, Drawn]:
        may_go_on.wait(20)
        seen.append("step")
        return step()

    engine.admit, engine.step = noting_admit, noting_step  # type: ignore[method-assign, assignment]
    thread = EngineThread(engine, most_waiting=10)

    async def ask() -> None:
        (first,) = thread.write([Prompt(TEXT[:2], 12, Sampling(random_seed=1))])
        while not seen:  # it is read at once
            await asyncio.sleep(0.01)
        later = [*thread.write(prompts(1)), *thread.write(prompts(2)[1:])]
        may_go_on.set()
        await asyncio.gather(*(one.written() for one in (first, *later)))

    try:
        asyncio.run(ask())
        assert seen[: 2 + STEPS_BETWEEN_PROMPTS] == ["1 read", *["step"] * STEPS_BETWEEN_PROMPTS, "2 read"]
    finally:
        thread.close()
        thread.join(20)


def test_what_is_under_way_ends_and_nothing_more_is_taken_once_it_is_closed(
    experts: list[PreTrainedModel],
) -> None:
    thread = EngineThread(opened(experts), most_waiting=10)

    async def ask() -> list[int]:
        asked = thread.write(prompts(5))
        thread.close()
        with pytest.raises(ClosedError, match="ending"):
            thread.write(prompts(1))
        return [len((await one.written()).tokens) for one in asked]

    assert asyncio.run(ask()) == [8] * 5
    thread.join(20)
    assert thread.failure is None


def test_everybody_hears_of_a_failure_and_later_callers_too(experts: list[PreTrainedModel]) -> None:
    engine = opened(experts)

    def fail() -> dict[int, Drawn]:
        raise RuntimeError("the device is gone")

    engine.step = fail  # type: ignore[method-assign, assignment]
    thread = EngineThread(engine, most_waiting=10)

    async def ask() -> None:
        asked = thread.write(prompts(5))
        for one in asked:
            with pytest.raises(RuntimeError, match="device is gone"):
                await one.written()
        with pytest.raises(ClosedError, match="device is gone"):
            thread.write(prompts(1))

    asyncio.run(ask())
    thread.join(20)
    assert isinstance(thread.failure, RuntimeError)


def test_prompts_that_cannot_be_read_cost_the_others_nothing(experts: list[PreTrainedModel]) -> None:
    engine = opened(experts)
    admit = engine.admit

    def fail_once(asked: Sequence[Prompt]) -> list[int]:
        if any(len(one.tokens) == 5 for one in asked):
            raise RuntimeError("out of memory")
        return admit(asked)

    engine.admit = fail_once  # type: ignore[method-assign]
    thread = EngineThread(engine, most_waiting=10)

    async def ask() -> int:
        long, short = thread.write([prompts(5)[4]])[0], thread.write([prompts(1)[0]])[0]
        with pytest.raises(RuntimeError, match="out of memory"):
            await long.written()
        return len((await short.written()).tokens)

    try:
        assert asyncio.run(ask()) == 8
    finally:
        thread.close()
        thread.join(20)
