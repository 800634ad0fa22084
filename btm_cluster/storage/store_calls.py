"""Store calls of this process: a count by verb and outcome, until somebody takes it.

Kept for a whole process and not for an adapter, since each step opens its store anew.
"""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import TypeAlias

DONE, TRIED_AGAIN, FAILED = "done", "tried again", "failed"
StoreCalls: TypeAlias = Mapping[tuple[str, str], int]
"""How many, by verb and outcome."""

_lock = threading.Lock()  # checkpoints are stored by threads of their own
_counts: Counter[tuple[str, str]] = Counter()


def count_store_call(verb: str, outcome: str) -> None:
    """Counts one. An object that is not there is an answer: `done`."""
    with _lock:
        _counts[verb, outcome] += 1


def take_store_calls() -> StoreCalls:
    """The counts since the last time."""
    with _lock:
        taken = dict(_counts)
        _counts.clear()
    return taken
