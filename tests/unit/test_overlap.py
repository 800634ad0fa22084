"""How much of a test text also stands in a training text, against a count by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_cluster.data.overlap import TestText, mark_seen

WORDS = st.lists(st.sampled_from("abcdef"), max_size=60).map(" ".join)


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + 20]) for i in range(len(words) - 19)}


@settings(max_examples=40, deadline=None)
@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=6), st.integers(1, 50))
def test_what_is_marked_is_what_a_search_by_hand_finds(
    tests: list[str], training: list[str], batch: int
) -> None:
    training = training + [text.upper() for text in tests[::2]] + [f"{text} tail" for text in tests[1::2]]
    marked = TestText(tests)
    mark_seen([marked, TestText(["other"])], training, batch)
    seen = {" ".join(text.casefold().split()) for text in training}
    assert marked.seen_documents.tolist() == [" ".join(text.casefold().split()) in seen for text in tests]
    in_tests = set().union(*map(runs, tests))
    assert len(marked.windows) == len(in_tests)
    assert marked.seen_windows.sum() == len(in_tests & set().union(*map(runs, training)))


def test_several_test_texts_are_marked_in_one_pass_and_each_by_itself() -> None:
    words = [f"w{i}" for i in range(100)]
    first, second = TestText([" ".join(words[:40])]), TestText([" ".join(words[20:60]), "short"])
    mark_seen([first, second], iter([" ".join(words[30:60]), "Short"]))
    assert (first.seen_windows.sum(), len(first.windows)) == (0, 21)
    assert (second.seen_windows.sum(), len(second.windows)) == (11, 21)
    assert (first.seen_documents.tolist(), second.seen_documents.tolist()) == ([False], [False, True])


@pytest.mark.parametrize("training", [[], ["short"], [""]])
def test_nothing_is_marked_where_there_is_nothing_to_find(training: list[str]) -> None:
    test = TestText(["a b c", " ".join(map(str, range(30)))])
    mark_seen([test], training)
    assert not test.seen_documents.any()
    assert not test.seen_windows.any()


def test_a_test_text_of_short_documents_has_no_windows() -> None:
    test = TestText(["a b c"])
    mark_seen([test], ["a b c"])
    assert test.seen_documents.tolist() == [True]
    assert test.windows.dtype == np.uint64
    assert len(test.seen_windows) == 0
