"""The learning rate against the formula that the paper states, and its behaviour at a branch."""

from dataclasses import replace
from fractions import Fraction

import pytest

from btm_cluster.equations.schedule import decay_line, learning_rate, rewarmed_learning_rate
from btm_cluster.language_model.optimizer import learning_rate_at
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.stored import open_blocks
from btm_cluster.steps.training_run import spec_of
from tests.integration.conftest import PreparedStore

BUDGETS = [(12, 1), (12, 0), (100, 8), (80_000, 6_400), (7, 7), (1, 0)]


@pytest.mark.parametrize(("updates", "warmup"), BUDGETS)
def test_the_learning_rate_rises_linearly_to_its_peak_and_falls_linearly_to_zero(
    updates: int, warmup: int
) -> None:
    for update in range(0, updates, max(1, updates // 97)):
        share = (
            Fraction(update + 1, warmup) if update < warmup else Fraction(updates - update, updates - warmup)
        )
        found = learning_rate(update, peak=5e-4, updates=updates, warmup_updates=warmup)
        assert found == pytest.approx(5e-4 * float(share), rel=1e-12)


def test_the_first_update_learns_and_the_line_reaches_zero_only_at_the_end_of_the_budget() -> None:
    rates = [learning_rate(u, peak=1.0, updates=100, warmup_updates=8) for u in range(101)]
    assert rates[0] == 1 / 8
    assert max(rates) == rates[7] == rates[8] == 1.0
    assert all(rate > 0 for rate in rates[:100])
    assert rates[100] == 0


def rate_at(update: int, request: TrainRequest, prepared_store: PreparedStore) -> float:
    """The learning rate as the train loop of a request has it."""
    texts = [open_blocks(prepared_store.driver.ledger, text) for text in request.texts]
    return learning_rate_at(update, spec_of(request, texts, first_token=0))


def test_a_branch_that_keeps_the_optimiser_continues_the_seeds_line(prepared_store: PreparedStore) -> None:
    expert = prepared_store.branches()[0]
    assert expert.start is not None
    assert expert.start.keep_optimizer
    seed = prepared_store.seed
    whole = [rate_at(update, prepared_store.transformer_lm, prepared_store) for update in range(12)]
    assert [rate_at(update, seed, prepared_store) for update in range(6)] == whole[:6]
    assert [rate_at(update, expert, prepared_store) for update in range(6, 12)] == whole[6:]


def direct_rewarmed(update: int, branch: int, peak: float, updates: int, warmup: int) -> float:
    """As PAPER.md states it: over 1 % of the expert's updates to the line's value
    at the branch, then the line to 0."""
    rise = max(1, round((updates - branch) / 100))
    at_branch = peak * min(1.0, (updates - branch) / (updates - warmup))
    if update < branch + rise:
        return at_branch * (update - branch + 1) / rise
    return peak * min(1.0, (updates - update) / (updates - warmup))


@pytest.mark.parametrize(
    ("branch", "updates", "warmup"), [(6, 12, 1), (500, 1000, 80), (40_000, 80_000, 6_400), (3, 1000, 80)]
)
def test_a_branch_without_an_optimiser_warms_up_again_and_then_follows_the_line(
    branch: int, updates: int, warmup: int
) -> None:
    for update in range(branch, updates):
        found = rewarmed_learning_rate(
            update, branch=branch, peak=3e-3, updates=updates, warmup_updates=warmup
        )
        assert found == pytest.approx(direct_rewarmed(update, branch, 3e-3, updates, warmup), rel=1e-12)


def test_a_second_warm_up_never_leaps_above_the_line_at_the_branch() -> None:
    rates = [
        rewarmed_learning_rate(u, branch=500, peak=1.0, updates=1000, warmup_updates=80)
        for u in range(500, 1000)
    ]
    assert max(rates) == decay_line(500, peak=1.0, updates=1000, warmup_updates=80)
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_an_expert_with_a_single_update_learns_in_it() -> None:
    # The rise once aimed at the line's value at its own end, which for one last update is the line's end:
    # zero.
    assert rewarmed_learning_rate(11, branch=11, peak=1.0, updates=12, warmup_updates=1) == pytest.approx(
        1 / 11
    )


def test_an_average_or_reset_branch_is_the_one_that_warms_up_again(prepared_store: PreparedStore) -> None:
    expert = prepared_store.branches()[0]
    assert expert.start is not None
    reset = reset_optimizer(expert)
    for update in range(6, 12):
        assert rate_at(update, reset, prepared_store) == pytest.approx(
            direct_rewarmed(update, 6, 3e-3, 12, 1), rel=1e-12
        )


def reset_optimizer(request: TrainRequest) -> TrainRequest:
    """The same branch with fresh Adam moments."""
    assert request.start is not None
    return replace(request, start=replace(request.start, keep_optimizer=False))
