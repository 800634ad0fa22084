"""Blocks of a forward pass, where they are left to the memory of the GPU. Plain arithmetic on sizes, as `memory.py`."""

from collections.abc import Iterator
from dataclasses import replace

from btm_cluster.language_model.memory import (
    ModelSize,
    PassSettings,
    Setting,
    candidate_settings,
    memory_of,
)

SURE_SHARE = 0.85
"""Share of the usable memory that may be filled so: estimates are 15 % off either way."""
BUSY_TOKENS = 2**13
"""Tokens of a pass that keep a GPU busy: for fewer, something else is tried that takes less memory."""
MOST_TOKENS = 2**17
"""Tokens of a pass, beyond which more gain nothing."""
MOST_LOGITS = 2**31 - 1
"""Logits of a pass: kernels count more with 64 bits, and slower."""


def choose_with_blocks(
    size: ModelSize, settings: PassSettings, usable_bytes: float, sharding: Setting, recomputing: Setting
) -> PassSettings:
    """The fastest settings that fit into so many bytes, among those that are left open, with the most blocks in a pass;
    `settings` has all of a rank's. Where nothing fits, the settings that take least."""
    best: PassSettings | None = None
    for one in candidate_settings(settings, sharding, recomputing):
        fitting = _with_most_blocks(size, one, SURE_SHARE * usable_bytes)
        if fitting is not None and (best is None or fitting.tokens > best.tokens):
            best = fitting
        if fitting is not None and (fitting.tokens >= BUSY_TOKENS or fitting.passes == 1):
            return fitting
    if best is not None:
        return best
    least = [
        _cut(one, settings.blocks, settings.blocks)
        for one in candidate_settings(settings, sharding, recomputing)
    ]
    return min(least, key=lambda one: memory_of(size, one).peak)


def _with_most_blocks(size: ModelSize, settings: PassSettings, usable_bytes: float) -> PassSettings | None:
    cuts = (_cut(settings, settings.blocks, passes) for passes in _numbers_of_passes(size, settings))
    return next((one for one in cuts if memory_of(size, one).peak <= usable_bytes), None)


def _numbers_of_passes(size: ModelSize, settings: PassSettings) -> Iterator[int]:
    """Numbers of passes into which a rank's blocks are cut, the fewest first: alike ones, since one of another size is
    compiled once more, unless those would be less than half as large."""
    most_tokens = min(MOST_TOKENS, MOST_LOGITS // size.vocabulary)
    passes = -(-settings.blocks // max(1, most_tokens // settings.block_tokens))
    while passes <= settings.blocks:
        alike = range(passes, min(2 * passes, settings.blocks + 1))
        yield next((number for number in alike if settings.blocks % number == 0), passes)
        passes += 1


def _cut(settings: PassSettings, blocks: int, passes: int) -> PassSettings:
    return replace(settings, blocks=-(-blocks // passes), passes=passes)
