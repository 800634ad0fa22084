"""Fits beside each other: torch's threads are given back however their uses overlap."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch

from btm_cluster.mixing.fitting import one_thread_each


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def threads_in(worker: Executor) -> int:
    return worker.submit(torch.get_num_threads).result()


def threads_in_a_new_one() -> int:
    with ThreadPoolExecutor(1) as worker:
        return threads_in(worker)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("ends_first", [0, 1])
def test_uses_that_overlap_give_back_every_threads_number(ends_first: int) -> None:
    """The one that began second took one for what there was, and left torch at one thread for good."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        workers = [one, other]
        uses: list[AbstractContextManager[int]] = [one_thread_each(), one_thread_each()]
        entered = [worker.submit(use.__enter__).result() for worker, use in zip(workers, uses, strict=True)]
        assert entered == [3, 3]
        workers[ends_first].submit(uses[ends_first].__exit__, None, None, None).result()
        last = 1 - ends_first
        assert [threads_in(workers[last]), threads_in_a_new_one()] == [1, 1], "the other goes on with one"
        workers[last].submit(uses[last].__exit__, None, None, None).result()
        assert [threads_in(one), threads_in(other), threads_in_a_new_one()] == [3, 3, 3]


@pytest.mark.usefixtures("three_threads")
def test_a_use_within_another_ends_with_the_outer_one() -> None:
    with one_thread_each():
        with one_thread_each() as had:
            assert had == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
