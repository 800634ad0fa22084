"""How much of a test text also stands in a training text: whole documents, and 20-word windows of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from btm_cluster.language_model.corpus import content_hash, word_windows


class TestText:
    """One test text's documents and windows, and which of them were seen in training text."""

    __test__ = False  # no test class, whatever pytest makes of the name

    def __init__(self, documents: Iterable[str]) -> None:
        texts = list(documents)
        self.documents = [content_hash(text) for text in texts]
        self.windows = np.unique(np.concatenate([word_windows(text) for text in texts] or [np.zeros(0, np.uint64)]))
        self.seen_documents = np.zeros(len(self.documents), dtype=bool)
        self.seen_windows = np.zeros(len(self.windows), dtype=bool)


def mark_seen(tests: Sequence[TestText], training: Iterable[str], batch_words: int = 2_000_000) -> None:
    """Marks in every test text what stands in the training documents. Memory: the tests, and one batch of windows."""
    places: dict[bytes, list[tuple[TestText, int]]] = {}
    for test in tests:
        for i, key in enumerate(test.documents):
            places.setdefault(key, []).append((test, i))
    batch: list[np.ndarray] = []
    held = 0
    for text in training:
        for test, i in places.get(content_hash(text), ()):
            test.seen_documents[i] = True
        windows = word_windows(text)
        batch.append(windows)
        held += len(windows)
        if held > batch_words:
            _mark_windows(tests, np.concatenate(batch))
            batch, held = [], 0
    if batch:
        _mark_windows(tests, np.concatenate(batch))


def _mark_windows(tests: Sequence[TestText], windows: np.ndarray) -> None:
    windows = np.unique(windows)
    for test in tests:
        test.seen_windows |= np.isin(test.windows, windows, assume_unique=True)
