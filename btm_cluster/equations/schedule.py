"""Learning rate: warm-up, linear decay over the whole budget, and what happens to it at a branch."""

REWARM_SHARE = 0.01
"""Share of an expert's updates over which a branch without an optimiser warms up again."""


def learning_rate(update: int, *, peak: float, updates: int, warmup_updates: int) -> float:
    """The learning rate of update `update` (0 … updates-1): a linear rise to
    `peak`, then a linear fall to 0 at `updates`.

    A branch that keeps the seed's optimiser continues down this line. Source: paper, section 4.1.
    """
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    return decay_line(update, peak=peak, updates=updates, warmup_updates=warmup_updates)


def decay_line(update: int, *, peak: float, updates: int, warmup_updates: int) -> float:
    """The falling part of the schedule, without the warm-up."""
    return peak * min(1.0, (updates - update) / max(1, updates - warmup_updates))


def rewarmed_learning_rate(
    update: int, *, branch: int, peak: float, updates: int, warmup_updates: int
) -> float:
    """After a branch at update `branch` with fresh Adam moments: a rise to the
    line's value there, then the line.

    For averages and pretrained seeds, which have no optimiser to continue.
    """
    rewarm = max(1, round(REWARM_SHARE * (updates - branch)))
    if update - branch < rewarm:
        target = decay_line(branch, peak=peak, updates=updates, warmup_updates=warmup_updates)
        return target * (update - branch + 1) / rewarm
    return decay_line(update, peak=peak, updates=updates, warmup_updates=warmup_updates)
