"""The cost of a recipe. Plain arithmetic, no torch."""

import heapq
from collections.abc import Sequence


def wall_hours(trainings: Sequence[tuple[float, float]]) -> float:
    """Hours until all trainings are done, each of so many hours on such a share of the machines. Each starts
    once those before it have started and its share is free."""
    running: list[tuple[float, float]] = []
    now, free = 0.0, 1.0
    for hours, share in trainings:
        share = min(share, 1.0)  # what can never be had is refused elsewhere
        while free + 1e-9 < share:
            now, released = heapq.heappop(running)
            free += released
        free -= share
        heapq.heappush(running, (now + hours, share))
    return max((end for end, _ in running), default=0.0)


def stored_bytes(parameters: int, with_optimizer: bool, is_rounded: bool = False, by_muon: int = 0) -> int:
    """Bytes of a stored model of float32 weights, or of bfloat16 ones where it `is_rounded`; with the optimiser
    where a branch needs it, in which rounded weights stand in float32 too: Adam's two moments, but one of the
    parameters that are trained `by_muon`."""
    weights = parameters * (2 if is_rounded else 4)
    optimizer = parameters * (8 + (4 if is_rounded else 0)) - 4 * by_muon
    return weights + (optimizer if with_optimizer else 0)


def trained_bytes(parameters: int, by_muon: int = 0) -> int:
    """Bytes of memory that a model takes while it is trained, at least: weights, gradients and Adam's two
    moments in float32, but one of the parameters that are trained `by_muon`. Activations come on top."""
    return parameters * 4 * 4 - 4 * by_muon


def frozen_bytes(parameters: int) -> int:
    """Bytes of memory that frozen weights take beside those that are trained, at least: in bfloat16."""
    return parameters * 2


def training_flops_per_token(
    parameters: int, layers: int, width: int, block_tokens: int, trained: int | None = None
) -> int:
    """Operations per token, forward and backward: 6 for each parameter, and attention over the block.

    Of parameters that are frozen only 4, since none has a gradient: 2 forward, and 2 for the gradient of what
    it reads. `trained` are all but those; by default all.

    Source: Chowdhery et al., 2022, PaLM, appendix B.
    """
    trained = parameters if trained is None else trained
    return 4 * parameters + 2 * trained + 12 * layers * width * block_tokens


def inference_flops_per_token(parameters: int, layers: int, width: int, block_tokens: int) -> int:
    """Operations per token of the forward pass alone: a third of those of training (same source)."""
    return 2 * parameters + 4 * layers * width * block_tokens
