"""Weighted sums of models' elements, in float32, block by block: the arithmetic of averages.

Knows tensors, and nothing of where they come from.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

SUMMED_AT_ONCE = 2**20
"""Elements: their sum and a model's elements in float32 take 4 MiB each. With fewer, which would stay in a core's own
cache, several threads are slower, and one is a little faster. As many for several averages, whose sums are then the
same bit by bit on any processor."""
HALF_PRECISION = (torch.bfloat16, torch.float16)


def cut(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Where each of the parts of at most `at_once` elements begins, and how many it has."""
    return ((start, min(at_once, count - start)) for start in range(0, count, at_once))


def weighted_sums(
    read_M: Iterable[Iterable[torch.Tensor]], weights_AM: Sequence[Sequence[float]], size: int
) -> list[torch.Tensor]:
    """Σ w_i θ_i in float32 of `size` elements, as they are read in pieces of each model, for each average."""
    totals = [torch.zeros(size, dtype=torch.float32) for _ in weights_AM]
    # Widened here and not by `add_`, which would allocate as much for every piece.
    wide = torch.empty(size, dtype=torch.float32)
    for model, pieces in enumerate(read_M):
        weighted = [(total, weights_M[model]) for total, weights_M in zip(totals, weights_AM, strict=True)]
        at = 0
        for piece in pieces:
            addend = wide[: len(piece)].copy_(piece) if piece.dtype in HALF_PRECISION else piece
            for total, weight in weighted:
                if weight:
                    total[at : at + len(piece)].add_(addend, alpha=weight)
            at += len(piece)
    return totals


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, in float32 where it has half precision."""
    return tensor.float() if tensor.dtype in HALF_PRECISION else tensor
