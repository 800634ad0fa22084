"""How much of a test text also stands in a training text: whole documents, and 20-word windows of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from btm_cluster.data.batches import batches
from btm_cluster.data.corpus import content_hash
from btm_cluster.data.word_windows import word_windows

WORD_CHARACTERS = 6
"""Characters of a word and its space, about."""


class TestText:
    """One test text's documents and windows, and which of them were seen in training text."""

    __test__ = False  # no test class, whatever pytest makes of the name

    def __init__(self, documents: Iterable[str]) -> None:
        texts = list(documents)
        self.documents = [content_hash(text) for text in texts]
        self.windows = np.unique(
            np.concatenate([word_windows(text) for text in texts] or [np.zeros(0, np.uint64)])
        )
        self.seen_documents = np.zeros(len(self.documents), dtype=bool)
        self.seen_windows = np.zeros(len(self.windows), dtype=bool)


def mark_seen(tests: Sequence[TestText], training: Iterable[str], batch_windows: int = 2_000_000) -> None:
    """Marks in every test text what stands in the training documents.

    Memory: the tests, and one batch of windows.
    """
    documents: dict[bytes, list[tuple[TestText, int]]] = {}
    for test in tests:
        for i, key in enumerate(test.documents):
            documents.setdefault(key, []).append((test, i))
    every_window = np.unique(np.concatenate([test.windows for test in tests]))
    seen = np.zeros(len(every_window), dtype=bool)
    for texts in batches(training, lambda text: len(text) // WORD_CHARACTERS, batch_windows):
        for text in texts:
            for test, i in documents.get(content_hash(text), ()):
                test.seen_documents[i] = True
        _mark(every_window, seen, np.concatenate([word_windows(text) for text in texts]))
    for test in tests:
        test.seen_windows |= seen[np.searchsorted(every_window, test.windows)]


def _mark(every_window: np.ndarray, seen: np.ndarray, windows: np.ndarray) -> None:
    """Marks those of `every_window`, which is sorted, that stand in `windows`."""
    if not len(every_window):
        return
    windows = np.sort(windows)  # ascending look-ups stay in the cache
    places = np.searchsorted(every_window, windows)
    places[places == len(every_window)] = 0
    seen[places[every_window[places] == windows]] = True
