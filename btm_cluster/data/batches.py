"""The items of a stream in batches of bounded size. Knows nothing of what they are."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def batches(
    items: Iterable[Item], size: Callable[[Item], int], most: int, most_items: int | None = None
) -> Iterator[list[Item]]:
    """Items together, in order, until their sizes come to `most`, or there are `most_items` of them."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if held >= most or len(batch) == most_items:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
