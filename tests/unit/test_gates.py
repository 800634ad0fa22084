"""Gates against sums over all paths and direct sums, their limits, and what none of them may depend on."""

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from btm_cluster.equations.calibration import calibrate
from btm_cluster.equations.gate_features import features
from btm_cluster.equations.gates import (
    DISCOUNTS,
    Discounts,
    FixedShare,
    Gate,
    fit_discounts,
    fit_fixed_share,
    gate_loss,
    log_gated_mixture,
    take_evenly,
)
from btm_cluster.equations.learned_gate import (
    LearnedGate,
    TextScores,
    fit_gate,
    fit_gate_for_all,
    tune_gate,
)
from btm_cluster.equations.posterior import Posterior, evidence, fitted_prior, log_posterior, uniform_prior
from btm_cluster.mixing.fitting import Mixing
from tests.unit.test_posterior import everything, made_up_prior, made_up_scores


def made_up_text(blocks: int, random_seed: int, favourite: int = 0, tokens: int = 64) -> TextScores:
    """Scores of four experts: one knows the text, takes turns with another, and
    whoever is sure of itself is right more often."""
    generator = torch.Generator().manual_seed(random_seed)
    logp_EBT = made_up_scores(4, blocks, tokens, random_seed)
    turn_BT = (torch.rand(blocks, tokens, generator=generator) < 0.05).cumsum(-1) % 2 == 1
    logp_EBT[favourite] += torch.where(turn_BT, 1.5, 0.0)
    logp_EBT[(favourite + 1) % 4] += torch.where(turn_BT, 0.0, 1.5)
    noise_EBT = torch.rand(4, blocks, tokens, generator=generator, dtype=torch.float64)
    entropy_EBT = (-logp_EBT + 2 * noise_EBT).clamp(min=0.1)
    return TextScores(logp_EBT.clamp(max=-1e-3), entropy_EBT, everything(logp_EBT))


def train_gate(fits_bias: bool = True) -> LearnedGate:
    return fit_gate([made_up_text(5, random_seed=1)], fits_bias=fits_bias)


@pytest.fixture(scope="module")
def trained() -> LearnedGate:
    return train_gate()


@pytest.fixture(params=["fixed share", "discounts", "learned"])
def gate(request: pytest.FixtureRequest, trained: LearnedGate) -> Gate:
    """A gate of each kind over four experts."""
    prior_E = made_up_prior(4, random_seed=9)
    gates: dict[str, Gate] = {
        "fixed share": FixedShare(prior_E, 0.1, 2.0),
        "discounts": Discounts(
            prior_E, (0.0, 0.9, 1.0), torch.tensor([0.3, -0.1, 0.05], dtype=torch.float64)
        ),
        "learned": trained,
    }
    return gates[request.param]


def test_every_gates_weights_sum_to_one(gate: Gate) -> None:
    text = made_up_text(3, random_seed=2)
    weights_EBT = gate.log_weights(text.logp_EBT, text.entropy_EBT).exp()
    torch.testing.assert_close(weights_EBT.sum(0), torch.ones(3, 64, dtype=torch.float64))
    assert weights_EBT.std(0).max() > 0.01


def test_a_token_changes_no_weight_before_it_nor_its_own_and_none_of_another_block(gate: Gate) -> None:
    text = made_up_text(3, random_seed=3)
    changed = text.logp_EBT.clone()
    changed[2, 1, 30] -= 5
    before, after = (gate.log_weights(logp, text.entropy_EBT) for logp in (text.logp_EBT, changed))
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert torch.equal(before[:, 1, :31], after[:, 1, :31])
    assert not torch.equal(before[:, 1, 31], after[:, 1, 31])


def test_an_entropy_changes_no_weight_before_its_token(gate: Gate) -> None:
    text = made_up_text(3, random_seed=4)
    changed = text.entropy_EBT.clone()
    changed[2, 1, 30] += 1
    before, after = (gate.log_weights(text.logp_EBT, entropy) for entropy in (text.entropy_EBT, changed))
    assert torch.equal(before[:, 1, :30], after[:, 1, :30])
    assert torch.equal(before[:, 1, 30], after[:, 1, 30]) == (not isinstance(gate, LearnedGate))


def reordered(gate: Gate, order: list[int]) -> Gate:
    """The same gate for experts in another order."""
    assert isinstance(gate, FixedShare | Discounts | LearnedGate)
    name = "bias_E" if isinstance(gate, LearnedGate) else "log_prior_E"
    return replace(gate, **{name: getattr(gate, name)[order]})


def test_the_order_of_experts_changes_nothing(gate: Gate) -> None:
    text, order = made_up_text(2, random_seed=5), [2, 0, 3, 1]
    expected = gate.log_weights(text.logp_EBT, text.entropy_EBT)[order]
    found = reordered(gate, order).log_weights(text.logp_EBT[order], text.entropy_EBT[order])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_fit_survives_pickling(gate: Gate) -> None:
    again = pickle.loads(pickle.dumps(gate))
    for field in fields(gate):  # type: ignore[arg-type]
        mine, theirs = getattr(gate, field.name), getattr(again, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_the_mixture_under_a_gate_is_one_of_probabilities(gate: Gate) -> None:
    text = made_up_text(2, random_seed=6)
    weights_EBT = gate.log_weights(text.logp_EBT, text.entropy_EBT).exp()
    expected_BT = (weights_EBT * text.logp_EBT.exp()).sum(0).log()
    torch.testing.assert_close(log_gated_mixture(gate, text.logp_EBT, text.entropy_EBT), expected_BT)


# Fixed share


@pytest.mark.parametrize(("rate", "temperature"), [(0.2, 1.0), (0.03, 3.0), (0.9, 0.5)])
def test_fixed_share_is_the_sum_over_all_paths_of_experts(rate: float, temperature: float) -> None:
    logp_EBT, prior_E = made_up_scores(3, 1, 5, random_seed=7), made_up_prior(3, random_seed=8).exp()
    found = FixedShare(prior_E.log(), rate, temperature).log_weights(logp_EBT).exp()
    for t in range(5):
        totals = [0.0, 0.0, 0.0]
        for path in itertools.product(range(3), repeat=t + 1):
            chance = float(prior_E[path[0]])
            for u in range(t):
                chance *= math.exp(float(logp_EBT[path[u], 0, u]) / temperature)
                chance *= (1 - rate) * (path[u] == path[u + 1]) + rate * float(prior_E[path[u + 1]])
            totals[path[-1]] += chance
        expected = torch.tensor(totals, dtype=torch.float64) / sum(totals)
        torch.testing.assert_close(found[:, 0, t], expected, rtol=1e-11, atol=0)


def test_without_switching_fixed_share_is_the_tempered_full_posterior_and_with_nothing_else_the_prior() -> (
    None
):
    logp_EBT, prior_E = made_up_scores(4, 3, 50, random_seed=10), made_up_prior(4, random_seed=11)
    for temperature in (1.0, 8.0):
        expected = log_posterior(logp_EBT, prior_E, Posterior("full", weight=1 / temperature))
        torch.testing.assert_close(FixedShare(prior_E, 0.0, temperature).log_weights(logp_EBT), expected)
    always = FixedShare(prior_E, 1.0).log_weights(logp_EBT)
    torch.testing.assert_close(always, prior_E[:, None, None].expand_as(logp_EBT))


def test_an_expert_that_the_prior_excludes_never_gets_weight_under_fixed_share() -> None:
    prior_E = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    weights_EBT = FixedShare(prior_E, 0.1).log_weights(made_up_scores(3, 2, 20, random_seed=12))
    assert (weights_EBT[2] == -math.inf).all()
    assert torch.isfinite(weights_EBT[:2]).all()


def test_the_fitted_switching_rate_and_temperature_are_the_best_of_those_tried() -> None:
    text = made_up_text(4, random_seed=13)
    found = fit_fixed_share(text.logp_EBT, text.mask_BT)
    best = gate_loss(found, text.logp_EBT, text.entropy_EBT, text.mask_BT)
    assert found.switching_rate > 0
    for other in (FixedShare(found.log_prior_E, 0.0, 1.0), FixedShare(found.log_prior_E, 0.3, 8.0)):
        assert gate_loss(other, text.logp_EBT, text.entropy_EBT, text.mask_BT) > best


# Several discounts


def test_discounts_are_direct_sums_over_the_past() -> None:
    logp_EBT, prior_E = made_up_scores(3, 2, 9, random_seed=14), made_up_prior(3, random_seed=15)
    weights_G = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
    found = Discounts(prior_E, (0.0, 0.8, 1.0), weights_G).log_weights(logp_EBT)
    for b, t in itertools.product(range(2), range(9)):
        score_E = prior_E.clone()
        for gamma, weight in zip((0.0, 0.8, 1.0), weights_G, strict=True):
            for u in range(t):
                score_E += weight * gamma ** (t - 1 - u) * logp_EBT[:, b, u]
        torch.testing.assert_close(found[:, b, t], torch.log_softmax(score_E, dim=0))


def test_one_discount_without_a_ridge_is_the_calibrated_posterior() -> None:
    text = made_up_text(6, random_seed=16)
    prior_E, posterior = calibrate(text.logp_EBT, text.mask_BT, Posterior("calibrated", discount=0.9))
    found = fit_discounts(text.logp_EBT, text.mask_BT, (0.9,), ridge=0.0, prior_ridge=0.0)
    assert float(found.weights_G[0]) == pytest.approx(posterior.weight, rel=1e-3)
    # As probabilities: how small the prior of an expert of no use is hangs on when a climb stops.
    torch.testing.assert_close(found.log_prior_E.exp(), prior_E.exp(), rtol=0, atol=1e-3)
    same_EBT = torch.softmax(prior_E[:, None, None] + evidence(text.logp_EBT, posterior), dim=0)
    torch.testing.assert_close(found.log_weights(text.logp_EBT).exp(), same_EBT, rtol=0, atol=5e-3)


def test_more_discounts_serve_the_blocks_they_are_fitted_on_better_and_a_huge_ridge_leaves_none() -> None:
    text = made_up_text(6, random_seed=17)

    def loss(found: Gate) -> float:
        return gate_loss(found, text.logp_EBT, text.entropy_EBT, text.mask_BT)

    seven = fit_discounts(text.logp_EBT, text.mask_BT, DISCOUNTS, ridge=0.0, prior_ridge=0.0)
    one = fit_discounts(text.logp_EBT, text.mask_BT, (0.97,), ridge=0.0, prior_ridge=0.0)
    none = fit_discounts(text.logp_EBT, text.mask_BT, DISCOUNTS, ridge=1e9, prior_ridge=0.0)
    assert loss(seven) < loss(one) < loss(none)
    plain_E = fitted_prior(text.logp_EBT, text.mask_BT).exp()
    torch.testing.assert_close(none.log_prior_E.exp(), plain_E, rtol=0, atol=1e-3)


def test_padding_and_its_absence_make_no_difference_to_a_fit() -> None:
    text = made_up_text(3, random_seed=18, tokens=40)
    mask_BT = text.mask_BT.clone()
    mask_BT[2, 25:] = False
    cleared, noisy = text.logp_EBT.clone(), text.logp_EBT.clone()
    cleared[:, ~mask_BT] = 0
    noisy[:, ~mask_BT] = -9
    one, other = (fit_discounts(logp, mask_BT) for logp in (cleared, noisy))
    torch.testing.assert_close(one.weights_G, other.weights_G)
    one_gate, other_gate = (
        fit_gate([TextScores(logp, text.entropy_EBT, mask_BT)]) for logp in (cleared, noisy)
    )
    assert torch.equal(one_gate.linear_F, other_gate.linear_F)


@pytest.mark.parametrize("fit", [fit_fixed_share, fit_discounts])
def test_without_a_token_the_weights_stay_finite(fit: Callable[..., Gate]) -> None:
    logp_EBT = torch.zeros(3, 0, 8, dtype=torch.float64)
    found = fit(logp_EBT, torch.zeros(0, 8, dtype=torch.bool))
    later = made_up_scores(3, 1, 8, random_seed=19)
    assert torch.isfinite(found.log_weights(later, later)).all()
    torch.testing.assert_close(found.log_weights(later, later)[:, 0, 0], uniform_prior(later))


def test_tokens_are_taken_evenly_and_all_where_there_are_few() -> None:
    mask_BT = torch.ones(4, 50, dtype=torch.bool)
    mask_BT[3, 10:] = False
    assert torch.equal(take_evenly(mask_BT, 160), mask_BT)
    taken = take_evenly(mask_BT, 80)
    assert int(taken.sum()) == 80
    assert not (taken & ~mask_BT).any()
    assert taken.sum(1).tolist() == [25, 25, 25, 5]


# The learned gate


def test_the_learned_gate_does_better_on_unseen_blocks_than_any_fixed_weights(trained: LearnedGate) -> None:
    unseen = made_up_text(20, random_seed=21)
    prior_E = fitted_prior(unseen.logp_EBT, unseen.mask_BT)  # even those fitted on these very blocks
    fixed = FixedShare(prior_E, 1.0)
    losses = [gate_loss(g, unseen.logp_EBT, unseen.entropy_EBT, unseen.mask_BT) for g in (trained, fixed)]
    assert losses[0] < losses[1] - 0.02


def test_a_gate_for_all_serves_more_experts_than_it_was_fitted_on_and_knows_none_by_place() -> None:
    gate = fit_gate_for_all([made_up_text(4, seed, favourite=seed % 4) for seed in range(30, 33)])
    assert gate.bias_E is None
    text = made_up_text(2, random_seed=33)
    more = TextScores(*(torch.cat([x, x[:2]]) for x in (text.logp_EBT, text.entropy_EBT)), text.mask_BT)
    weights_EBT = gate.log_weights(more.logp_EBT, more.entropy_EBT)
    torch.testing.assert_close(weights_EBT.exp().sum(0), torch.ones(2, 64, dtype=torch.float64))
    torch.testing.assert_close(weights_EBT[:2], weights_EBT[4:])
    fixed = FixedShare(uniform_prior(text.logp_EBT), 1.0)
    losses = [gate_loss(g, text.logp_EBT, text.entropy_EBT, text.mask_BT) for g in (gate, fixed)]
    assert losses[0] < losses[1]


def test_a_fit_is_the_same_when_repeated_and_another_random_seed_gives_another(trained: LearnedGate) -> None:
    again = train_gate()
    other = fit_gate([made_up_text(5, random_seed=1)], fits_bias=True, random_seed=1)
    for field in fields(LearnedGate):
        assert torch.equal(getattr(trained, field.name), getattr(again, field.name))
    assert not torch.equal(trained.linear_F, other.linear_F)


def test_features_of_a_token_are_finite_and_hold_nothing_of_its_own_probability() -> None:
    text = made_up_text(2, random_seed=22)
    changed = text.logp_EBT.clone()
    changed[:, :, 40:] = -50
    before_BT = torch.zeros_like(text.mask_BT)
    before_BT[:, :41] = True
    one, other = (features(logp, text.entropy_EBT, before_BT) for logp in (text.logp_EBT, changed))
    assert torch.isfinite(one).all()
    assert torch.equal(one, other)


def test_a_tuned_gate_serves_its_text_better_and_leaves_the_one_for_all_as_it_is() -> None:
    start = fit_gate([made_up_text(5, random_seed=1)])
    text, unseen = made_up_text(3, random_seed=23), made_up_text(20, random_seed=25)
    for one in (text, unseen):
        one.logp_EBT[2] += 0.8  # an expert that is better all over the text
    tuned = tune_gate(text, start)
    losses = [gate_loss(g, unseen.logp_EBT, unseen.entropy_EBT, unseen.mask_BT) for g in (tuned, start)]
    assert losses[0] < losses[1] - 0.01, "three blocks are enough, judged on others"
    assert start.bias_E is None
    assert tuned.bias_E is not None
    assert int(tuned.bias_E.argmax()) == 2


def test_enough_text_tunes_every_weight_of_a_gate_and_little_leaves_them(trained: LearnedGate) -> None:
    blind = replace(
        trained, linear_F=torch.zeros_like(trained.linear_F), outer_H=torch.zeros_like(trained.outer_H)
    )
    unseen = made_up_text(20, random_seed=27)
    losses = []
    for blocks in (10, 50):  # of 64 tokens, a fifth held out: 128 and 640
        tuned = tune_gate(made_up_text(blocks, random_seed=28), blind)
        losses.append(gate_loss(tuned, unseen.logp_EBT, unseen.entropy_EBT, unseen.mask_BT))
        assert bool(tuned.linear_F.any()) == (blocks == 50)
    assert losses[1] < losses[0] - 0.02


def test_without_text_a_gate_weighs_all_alike_and_tuning_changes_nothing(trained: LearnedGate) -> None:
    empty = TextScores(torch.zeros(4, 0, 8), torch.zeros(4, 0, 8), torch.zeros(0, 8, dtype=torch.bool))
    assert tune_gate(empty, trained) is trained
    text = made_up_text(1, random_seed=26)
    found = fit_gate([empty]).log_weights(text.logp_EBT, text.entropy_EBT)
    torch.testing.assert_close(found, uniform_prior(found)[:, None, None].expand_as(found))


def test_a_single_block_which_leaves_none_to_hold_out_still_gives_a_gate() -> None:
    text = made_up_text(1, random_seed=24)
    found = fit_gate([text], fits_bias=True)
    assert torch.isfinite(found.log_weights(text.logp_EBT, text.entropy_EBT)).all()


RUNNING: list[Gate] = [
    Mixing(made_up_prior(4, random_seed=8), Posterior("full")),
    Mixing(made_up_prior(4, random_seed=8), Posterior("last-token")),
    Mixing(made_up_prior(4, random_seed=8), Posterior("window", window_tokens=5)),
    Mixing(made_up_prior(4, random_seed=8), Posterior("calibrated", discount=0.9, weight=0.4)),
    Mixing(made_up_prior(4, random_seed=8), Posterior("full", weight=0.0)),
    FixedShare(made_up_prior(4, random_seed=8), 0.1, 2.0),
    FixedShare(made_up_prior(4, random_seed=8), 0.0),
    FixedShare(made_up_prior(4, random_seed=8), 1.0),
    Discounts(made_up_prior(4, random_seed=8), DISCOUNTS, torch.linspace(-0.1, 0.2, 7, dtype=torch.float64)),
]


def assert_runs_as_it_weighs(gates: list[Gate], text: TextScores) -> None:
    """Each gate has a sequence of its own, of one batch, and reads a
    beginning at once and then token by token."""
    forms = [one.running() for one in gates]
    for first in (0, 1, 7):
        logp_EBF, entropy_EBF = text.logp_EBT[..., :first], text.entropy_EBT[..., :first]
        begun = [form.begin(logp_EBF[:, b], entropy_EBF[:, b]) for b, form in enumerate(forms)]
        state = {name: torch.stack([one[name] for one in begun], dim=-1) for name in begun[0]}
        for t in range(first, text.logp_EBT.shape[-1]):
            logp_EB, entropy_EB = text.logp_EBT[..., t], text.entropy_EBT[..., t]
            found_EB = forms[0].log_weights(state, entropy_EB)
            for b, one in enumerate(gates):
                expected_ET = one.log_weights(text.logp_EBT[:, b : b + 1], text.entropy_EBT[:, b : b + 1])[
                    :, 0
                ]
                torch.testing.assert_close(found_EB[:, b], expected_ET[:, t], rtol=1e-4, atol=1e-4)
            state |= forms[0].advance(state, logp_EB, entropy_EB)


@pytest.mark.parametrize("one", RUNNING, ids=str)
def test_a_gate_weighs_token_by_token_as_it_weighs_a_block(one: Gate) -> None:
    assert_runs_as_it_weighs([one], made_up_text(1, random_seed=4, tokens=20))


def test_gates_of_one_form_run_side_by_side_with_numbers_of_their_own(trained: LearnedGate) -> None:
    text = made_up_text(2, random_seed=5, tokens=20)
    other = replace(trained, linear_F=-trained.linear_F, bias_E=None)
    assert_runs_as_it_weighs([trained, other], text)
    assert_runs_as_it_weighs([RUNNING[0], RUNNING[3]], text)
    assert_runs_as_it_weighs([RUNNING[5], RUNNING[6]], text)


def test_only_bayes_rule_is_called_the_full_posterior(trained: LearnedGate) -> None:
    full = [one for one in [*RUNNING, trained] if one.running().is_full_posterior]
    assert full == [RUNNING[0], RUNNING[6]]


def test_the_full_posterior_stays_exact_over_a_long_text() -> None:
    """Sums of thousands of nats, in float32, would have moved the weights in the third digit."""
    logp_ET = made_up_scores(3, 1, 4000, random_seed=6)[:, 0] - 2
    form = Mixing(uniform_prior(logp_ET), Posterior("full")).running()
    state = {name: value[..., None] for name, value in form.begin(logp_ET[:, :0], logp_ET[:, :0]).items()}
    for t in range(4000):
        state |= form.advance(state, logp_ET[:, t, None], logp_ET[:, t, None])
    expected_E = torch.log_softmax(logp_ET.sum(1), dim=0)
    torch.testing.assert_close(
        form.log_weights(state, logp_ET[:, :1])[:, 0], expected_E, rtol=1e-9, atol=1e-9
    )
