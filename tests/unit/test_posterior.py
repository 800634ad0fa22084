"""The posterior and the priors against naive loops, exact arithmetic and independent fits."""

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch

from btm_cluster.equations import calibration, mixture_likelihood
from btm_cluster.equations.calibration import DEFAULT_EVIDENCE_WEIGHT, calibrate
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.newton_steps import CurvatureProducts, WholeCurvature
from btm_cluster.equations.posterior import (
    Posterior,
    discounted_sums,
    ema_prior,
    evidence,
    fitted_prior,
    keep_top,
    log_posterior,
    log_prior,
    mean_prior,
    responsibilities,
    uniform_prior,
)

FULL = Posterior("full")
CALIBRATED = Posterior("calibrated", discount=0.9)
KINDS = [
    FULL,
    Posterior("last-token"),
    Posterior("window", window_tokens=1),
    Posterior("window", window_tokens=3),
    Posterior("window", window_tokens=11),
    Posterior("window", window_tokens=500),
    Posterior("calibrated", discount=0.0, weight=0.7),
    Posterior("calibrated", discount=0.97, weight=0.22),
    Posterior("calibrated", discount=1.0, weight=1.5),
    Posterior("calibrated", discount=0.5, weight=0.0),
    Posterior("full", weight=0.1),
]


def made_up_scores(
    experts: int, blocks: int, tokens: int, random_seed: int, spread: float = 1.0
) -> torch.Tensor:
    """Log-probabilities [E, B, T] such as small models give: common
    difficulty, and an opinion of each expert."""
    generator = torch.Generator().manual_seed(random_seed)
    common = 3 + 3 * torch.rand(1, blocks, tokens, generator=generator, dtype=torch.float64)
    own = spread * torch.randn(experts, blocks, tokens, generator=generator, dtype=torch.float64)
    return -(common + own).clamp(min=1e-3)


def made_up_prior(experts: int, random_seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.log_softmax(torch.randn(experts, generator=generator, dtype=torch.float64), dim=0)


def everything(logp_EBT: torch.Tensor) -> torch.Tensor:
    """A mask without padding."""
    return torch.ones(logp_EBT.shape[1:], dtype=torch.bool)


def naive_posterior(
    logp: list[list[float]], log_prior: list[float], posterior: Posterior
) -> list[list[float]]:
    """p(D=j | x_<t) of one block, [T][E]: a loop over tokens, experts and the past, in 50 digits."""
    experts, tokens = len(logp), len(logp[0])
    result = []
    for t in range(tokens):
        unnormalised = []
        for j in range(experts):
            if posterior.kind == "full":
                seen = [(1, logp[j][u]) for u in range(t)]
            elif posterior.kind == "last-token":
                seen = [(1, logp[j][t - 1])] if t else []
            elif posterior.kind == "window":
                seen = [(1, logp[j][u]) for u in range(max(0, t - posterior.window_tokens), t)]
            else:
                seen = [(mpmath.mpf(posterior.discount) ** (t - 1 - u), logp[j][u]) for u in range(t)]
            total = sum((mpmath.mpf(weight) * mpmath.mpf(value) for weight, value in seen), mpmath.mpf(0))
            unnormalised.append(mpmath.exp(mpmath.mpf(log_prior[j]) + mpmath.mpf(posterior.weight) * total))
        norm = sum(unnormalised)
        result.append([float(value / norm) for value in unnormalised])
    return result


@pytest.fixture(autouse=True)
def _fifty_digits() -> None:
    mpmath.mp.dps = 50


@pytest.mark.parametrize("posterior", KINDS, ids=str)
def test_every_posterior_is_what_a_loop_over_the_past_gives(posterior: Posterior) -> None:
    logp_EBT, prior_E = made_up_scores(3, 2, 12, random_seed=1), made_up_prior(3, random_seed=2)
    found = log_posterior(logp_EBT, prior_E, posterior).exp()
    for block in range(2):
        expected = naive_posterior(logp_EBT[:, block].tolist(), prior_E.tolist(), posterior)
        np.testing.assert_allclose(found[:, block].T.numpy(), expected, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("posterior", KINDS, ids=str)
def test_the_ensemble_is_a_mixture_of_probabilities_under_that_posterior(posterior: Posterior) -> None:
    logp_EBT, prior_E = made_up_scores(4, 1, 12, random_seed=3), made_up_prior(4, random_seed=4)
    weights = naive_posterior(logp_EBT[:, 0].tolist(), prior_E.tolist(), posterior)
    expected = [
        math.log(sum(w * math.exp(logp_EBT[j, 0, t]) for j, w in enumerate(weights[t]))) for t in range(12)
    ]
    np.testing.assert_allclose(log_mixture(logp_EBT, prior_E, posterior)[0].numpy(), expected, rtol=1e-11)


@pytest.mark.parametrize("posterior", KINDS, ids=str)
def test_at_position_zero_the_posterior_is_the_prior(posterior: Posterior) -> None:
    prior_E = made_up_prior(5, random_seed=5)
    found = log_posterior(made_up_scores(5, 7, 4, random_seed=6), prior_E, posterior)[:, :, 0]
    torch.testing.assert_close(found, prior_E[:, None].expand(5, 7), rtol=0, atol=1e-15)


@pytest.mark.parametrize("posterior", KINDS, ids=str)
def test_a_token_changes_the_posterior_only_of_later_tokens_in_its_own_block(posterior: Posterior) -> None:
    logp_EBT, prior_E = made_up_scores(3, 4, 12, random_seed=7), made_up_prior(3, random_seed=8)
    changed = logp_EBT.clone()
    changed[0, 1, 5] -= 7
    before, after = log_posterior(logp_EBT, prior_E, posterior), log_posterior(changed, prior_E, posterior)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert torch.equal(before[:, 1, :6], after[:, 1, :6])
    assert torch.equal(before[:, 1, 6], after[:, 1, 6]) == (posterior.weight == 0)


def test_the_kinds_of_evidence_meet_where_their_definitions_do() -> None:
    logp_EBT = made_up_scores(3, 5, 20, random_seed=9)
    full = evidence(logp_EBT, FULL)
    torch.testing.assert_close(evidence(logp_EBT, Posterior("calibrated", discount=1.0)), full)
    torch.testing.assert_close(evidence(logp_EBT, Posterior("window", window_tokens=20)), full)
    last = evidence(logp_EBT, Posterior("last-token"))
    torch.testing.assert_close(evidence(logp_EBT, Posterior("calibrated", discount=0.0)), last)
    torch.testing.assert_close(evidence(logp_EBT, Posterior("window", window_tokens=1)), last)


def test_evidence_leaves_the_scores_as_they_are() -> None:
    logp_EBT = made_up_scores(2, 3, 9, random_seed=10)
    kept = logp_EBT.clone()
    for posterior in KINDS:
        evidence(logp_EBT, posterior)
    assert torch.equal(logp_EBT, kept)


def test_a_long_block_of_one_sided_evidence_neither_over_nor_underflows() -> None:
    logp_EBT = torch.full((2, 1, 4096), -1.0, dtype=torch.float64)
    logp_EBT[1] = -200.0
    found = log_posterior(logp_EBT, made_up_prior(2, random_seed=11), FULL)
    assert torch.isfinite(found).all()
    assert found[1, 0, -1] == pytest.approx(-199 * 4095, rel=1e-3)
    torch.testing.assert_close(
        log_mixture(logp_EBT, torch.zeros(2).double(), FULL)[0, 1:], logp_EBT[0, 0, 1:]
    )


def test_responsibilities_are_bayes_rule_with_the_token_itself_seen() -> None:
    logp_EBT, prior_E = made_up_scores(3, 1, 6, random_seed=12), made_up_prior(3, random_seed=13)
    found = responsibilities(logp_EBT, prior_E, FULL)
    for t in range(6):
        joint = [math.exp(prior_E[j] + sum(logp_EBT[j, 0, u].item() for u in range(t + 1))) for j in range(3)]
        np.testing.assert_allclose(found[:, 0, t].numpy(), np.array(joint) / sum(joint), rtol=1e-11)


# The ema prior


def exact_ema(block_logp: list[list[float]], rate: str = "0.3") -> list[mpmath.mpf]:
    """q [E] in as many digits as it takes: probabilities, plainly as the paper writes them.

    `block_logp` is [E][B].
    """
    experts, blocks = len(block_logp), len(block_logp[0])
    keep, take = 1 - mpmath.mpf(rate), mpmath.mpf(rate)
    q = [mpmath.mpf(1) / experts] * experts
    for i in range(blocks):
        joint = [q[j] * mpmath.exp(mpmath.mpf(block_logp[j][i])) for j in range(experts)]
        post = [value / sum(joint) for value in joint]
        q = post if i == 0 else [keep * old + take * new for old, new in zip(q, post, strict=True)]
    return q


@pytest.mark.parametrize("random_seed", range(4))
def test_the_ema_prior_is_the_papers_recursion_in_exact_arithmetic(random_seed: int) -> None:
    logp_EBT = made_up_scores(4, 9, 5, random_seed)
    expected = exact_ema(logp_EBT.sum(-1).tolist())
    np.testing.assert_allclose(
        ema_prior(logp_EBT).numpy(), [float(mpmath.log(q)) for q in expected], rtol=1e-9
    )
    assert float(ema_prior(logp_EBT).exp().sum()) == pytest.approx(1, rel=1e-12)


def test_the_ema_prior_leaves_a_first_block_that_no_float_probability_could_leave() -> None:
    # The first block is 800 nats for expert 0, every later one 300 for expert 1: exp(-800) is zero as a
    # float, and zero is kept by every later step of the recursion, however much speaks for expert 1.
    logp_EBT = torch.zeros(2, 7, 10, dtype=torch.float64)
    logp_EBT[1, 0] = -80.0
    logp_EBT[0, 1:] = -30.0
    in_floats = np.array([0.5, 0.5])
    for i, block in enumerate(logp_EBT.sum(-1).T.numpy()):
        post = in_floats * np.exp(block - block.max())
        in_floats = post / post.sum() if i == 0 else 0.7 * in_floats + 0.3 * post / post.sum()
    assert in_floats.tolist() == [1.0, 0.0]
    mpmath.mp.dps = 1000
    expected = exact_ema(logp_EBT.sum(-1).tolist())
    assert expected[1] > 0.6
    np.testing.assert_allclose(
        ema_prior(logp_EBT).numpy(), [float(mpmath.log(q)) for q in expected], rtol=1e-10
    )


def test_the_ema_prior_weighs_the_newest_block_most() -> None:
    logp_EBT = torch.zeros(2, 2, 1, dtype=torch.float64)
    logp_EBT[:, 0, 0] = torch.tensor([-1.0, -2.0])
    logp_EBT[:, 1, 0] = torch.tensor([-2.0, -1.0])
    forwards, backwards = ema_prior(logp_EBT), ema_prior(logp_EBT.flip(1))
    torch.testing.assert_close(forwards, backwards.flip(0))
    assert forwards[0] != forwards[1]


# The fitted prior


def em_in_probabilities(likelihood_EN: np.ndarray, steps: int = 20_000) -> np.ndarray:
    """Mixture weights by textbook EM: responsibilities, then their mean."""
    w_E = np.full(len(likelihood_EN), 1 / len(likelihood_EN))
    for _ in range(steps):
        responsibility_EN = w_E[:, None] * likelihood_EN
        responsibility_EN /= responsibility_EN.sum(0)
        w_E = responsibility_EN.mean(1)
    return w_E


def log_likelihood(log_weights_E: torch.Tensor, logp_EN: torch.Tensor) -> float:
    return float(torch.logsumexp(log_weights_E[:, None] + logp_EN, dim=0).mean())


@pytest.mark.parametrize("random_seed", range(3))
def test_the_fitted_prior_is_that_of_an_independent_em(random_seed: int) -> None:
    logp_EBT = made_up_scores(4, 6, 50, random_seed, spread=2.0)
    expected = em_in_probabilities(np.exp(logp_EBT.flatten(1).numpy()))
    np.testing.assert_allclose(
        fitted_prior(logp_EBT, everything(logp_EBT)).exp().numpy(), expected, atol=1e-3
    )


@pytest.mark.parametrize("random_seed", range(6))
def test_the_fitted_prior_satisfies_the_conditions_of_a_maximum(random_seed: int) -> None:
    # The likelihood is concave in the weights, and max_j mean(p_j / mixture) - 1 bounds how much is left to
    # gain.
    logp_EBT = made_up_scores(5, 8, 40, 100 + random_seed, spread=0.5 + random_seed)
    logp_EN = logp_EBT.flatten(1)
    log_w_E = fitted_prior(logp_EBT, everything(logp_EBT))
    mixture_N = torch.logsumexp(log_w_E[:, None] + logp_EN, dim=0)
    gains_E = (logp_EN - mixture_N).exp().mean(1)
    assert float(gains_E.max()) < 1 + 2e-4
    assert float((log_w_E.exp() * gains_E).sum()) == pytest.approx(1, rel=1e-9)


def test_the_fitted_prior_finds_the_weights_that_made_the_tokens() -> None:
    rng = np.random.default_rng(14)
    truth, vocabulary, tokens = np.array([0.6, 0.3, 0.1]), 20, 40_000
    p_EV = rng.dirichlet(np.ones(vocabulary), size=3)
    drawn_N = rng.choice(vocabulary, size=tokens, p=truth @ p_EV)
    logp_EBT = torch.from_numpy(np.log(p_EV[:, drawn_N])).reshape(3, 40, 1000)
    np.testing.assert_allclose(fitted_prior(logp_EBT, everything(logp_EBT)).exp().numpy(), truth, atol=0.02)


def test_the_fitted_prior_does_not_care_how_hard_a_token_is() -> None:
    logp_EBT = made_up_scores(3, 4, 20, random_seed=15)
    harder = logp_EBT - 5000 * torch.rand(
        1, 4, 20, generator=torch.Generator().manual_seed(16), dtype=torch.float64
    )
    torch.testing.assert_close(
        fitted_prior(harder, everything(harder)).exp(),
        fitted_prior(logp_EBT, everything(logp_EBT)).exp(),
        rtol=0,
        atol=1e-6,
    )


# The mean prior, top-k, and what all priors share


@pytest.mark.parametrize("posterior", KINDS, ids=str)
def test_the_mean_prior_is_the_average_responsibility_of_a_loop_over_real_tokens(
    posterior: Posterior,
) -> None:
    logp_EBT = made_up_scores(3, 2, 12, random_seed=17)
    mask_BT = everything(logp_EBT)
    mask_BT[1, 7:] = False
    logp_EBT[:, ~mask_BT] = 0.0
    totals = np.zeros(3)
    for block, tokens in ((0, 12), (1, 7)):
        weights = naive_posterior(logp_EBT[:, block].tolist(), [0.0, 0.0, 0.0], posterior)
        for t in range(tokens):
            joint = np.array([weights[t][j] * math.exp(logp_EBT[j, block, t]) for j in range(3)])
            totals += joint / joint.sum()
    np.testing.assert_allclose(
        mean_prior(logp_EBT, mask_BT, posterior).exp().numpy(), totals / 19, rtol=1e-10
    )


def test_top_k_keeps_the_largest_entries_renormalised_and_the_others_play_no_part() -> None:
    prior_E = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    kept = keep_top(prior_E, 2)
    torch.testing.assert_close(kept.exp(), torch.tensor([0, 4 / 7, 0, 3 / 7], dtype=torch.float64))
    logp_EBT = made_up_scores(4, 3, 10, random_seed=18)
    logp_EBT[[0, 2]] = torch.rand(
        2, 3, 10, generator=torch.Generator().manual_seed(19), dtype=torch.float64
    ).log()
    for posterior in KINDS:
        torch.testing.assert_close(
            log_mixture(logp_EBT, kept, posterior),
            log_mixture(logp_EBT[[1, 3]], kept[[1, 3]], posterior),
            rtol=1e-12,
            atol=1e-12,
        )


def test_top_k_of_all_experts_or_of_no_limit_changes_nothing_and_top_1_is_one_hot() -> None:
    prior_E = made_up_prior(4, random_seed=20)
    for k in (None, 4, 9):
        assert torch.equal(keep_top(prior_E, k), prior_E)
    assert keep_top(prior_E, 1).exp().tolist() == [float(i == int(prior_E.argmax())) for i in range(4)]


@pytest.mark.parametrize("kind", ["fitted", "ema", "mean", "uniform"])
def test_padding_plays_no_part_in_a_prior(kind: str) -> None:
    logp_EBT = made_up_scores(3, 5, 16, random_seed=21)
    padded = torch.cat([logp_EBT, torch.zeros(3, 5, 6, dtype=torch.float64)], dim=-1)
    mask_BT = torch.cat([everything(logp_EBT), torch.zeros(5, 6, dtype=torch.bool)], dim=-1)
    torch.testing.assert_close(
        log_prior(kind, padded, mask_BT, FULL), log_prior(kind, logp_EBT, everything(logp_EBT), FULL)
    )


@pytest.mark.parametrize("kind", ["fitted", "ema", "mean", "uniform"])
@pytest.mark.parametrize("experts", [1, 2, 7])
def test_a_prior_without_a_block_or_without_a_real_token_is_uniform(kind: str, experts: int) -> None:
    no_block = torch.zeros(experts, 0, 8, dtype=torch.float64)
    only_padding = torch.zeros(experts, 2, 8, dtype=torch.float64)
    for logp_EBT in (no_block, only_padding):
        mask_BT = torch.zeros(logp_EBT.shape[1:], dtype=torch.bool)
        found = log_prior(kind, logp_EBT, mask_BT, FULL)
        torch.testing.assert_close(found.exp(), torch.full((experts,), 1 / experts, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["fitted", "ema", "mean", "uniform"])
def test_one_expert_has_all_of_the_prior(kind: str) -> None:
    logp_EBT = made_up_scores(1, 3, 8, random_seed=22)
    assert log_prior(kind, logp_EBT, everything(logp_EBT), FULL).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["fitted", "ema", "mean"])
@pytest.mark.parametrize("blocks", [1, 12])
def test_an_expert_with_hopeless_scores_gets_nothing_and_does_not_disturb_the_others(
    kind: str, blocks: int
) -> None:
    logp_EBT = made_up_scores(3, blocks, 16, random_seed=23)
    with_hopeless = torch.cat([logp_EBT, torch.full((1, blocks, 16), -1e4, dtype=torch.float64)])
    found = log_prior(kind, with_hopeless, everything(logp_EBT), FULL).exp()
    assert found[3] < 1e-6
    expected = log_prior(kind, logp_EBT, everything(logp_EBT), FULL).exp()
    torch.testing.assert_close(found[:3], expected, rtol=1e-4, atol=1e-5)


# The calibrated posterior


def drawn_from_a_calibrated_mixture(
    log_prior_E: np.ndarray, weight: float, discount: float, blocks: int, tokens: int, random_seed: int
) -> torch.Tensor:
    """Scores [E, B, T] of tokens that were drawn one after the other from the
    very mixture that `calibrate` assumes."""
    rng = np.random.default_rng(random_seed)
    experts, vocabulary = len(log_prior_E), 16
    logp_EBT = np.empty((experts, blocks, tokens))
    seen_EB = np.zeros((experts, blocks))
    for t in range(tokens):
        post_EB = np.exp(log_prior_E[:, None] + weight * seen_EB)
        post_EB /= post_EB.sum(0)
        p_EBV = rng.dirichlet(np.full(vocabulary, 0.5), size=(experts, blocks)) + 1e-6
        p_EBV /= p_EBV.sum(-1, keepdims=True)
        mixture_BV = np.einsum("eb,ebv->bv", post_EB, p_EBV)
        token_B = (mixture_BV.cumsum(1) > rng.random((blocks, 1))).argmax(1)
        logp_EBT[:, :, t] = np.log(p_EBV[:, np.arange(blocks), token_B])
        seen_EB = discount * seen_EB + logp_EBT[:, :, t]
    return torch.from_numpy(logp_EBT)


def loss_of(
    logp_EBT: torch.Tensor, mask_BT: torch.Tensor, log_prior_E: torch.Tensor, posterior: Posterior
) -> float:
    return -float(log_mixture(logp_EBT, log_prior_E, posterior)[mask_BT].mean())


def test_calibrating_finds_the_prior_and_the_evidence_weight_that_made_the_tokens() -> None:
    truth = np.log([0.5, 0.3, 0.2])
    logp_EBT = drawn_from_a_calibrated_mixture(
        truth, weight=0.4, discount=0.9, blocks=200, tokens=128, random_seed=24
    )
    prior_E, posterior = calibrate(logp_EBT, everything(logp_EBT), CALIBRATED)
    assert posterior == replace(CALIBRATED, weight=posterior.weight)
    assert posterior.weight == pytest.approx(0.4, abs=0.04)
    np.testing.assert_allclose(prior_E.exp().numpy(), np.exp(truth), atol=0.05)


def test_the_loss_that_is_climbed_and_its_derivatives_are_those_of_the_mixture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        mixture_likelihood, "SCORES_AT_ONCE", 4 * 7
    )  # several stretches, the last of them short
    logp_EBT = made_up_scores(experts=4, blocks=3, tokens=10, random_seed=26)
    evidence_EN, logp_EN = (values.flatten(1) for values in (evidence(logp_EBT, CALIBRATED), logp_EBT))
    point_P = torch.tensor([0.3, -1.0, 0.0, 2.0, math.log(0.2)], dtype=torch.float64, requires_grad=True)

    def loss(point_P: torch.Tensor) -> torch.Tensor:
        log_weights_EN = torch.log_softmax(point_P[:-1, None] + point_P[-1].exp() * evidence_EN, dim=0)
        return -torch.logsumexp(log_weights_EN + logp_EN, dim=0).mean()

    tokens = mixture_likelihood.MixtureLikelihood.of(evidence_EN, logp_EN)
    found = tokens.slopes(point_P[:-1].detach(), math.log(0.2))
    assert found.loss == pytest.approx(float(loss(point_P).detach()), rel=1e-12)
    assert tokens.loss((point_P[:-1].detach(), 0.2)) == pytest.approx(found.loss, rel=1e-12)
    (gradient_P,) = torch.autograd.grad(loss(point_P), point_P)
    torch.testing.assert_close(found.gradient_P, gradient_P)
    hessian_PP = torch.autograd.functional.hessian(loss, point_P)  # type: ignore[no-untyped-call]
    assert isinstance(found.curvature, WholeCurvature)
    torch.testing.assert_close(found.curvature.matrix_PP, hessian_PP)
    monkeypatch.setattr(mixture_likelihood, "MOST_EXPERTS_OF_WHOLE", 3)
    by_products = tokens.slopes(point_P[:-1].detach(), math.log(0.2))
    assert by_products.loss == found.loss
    torch.testing.assert_close(by_products.gradient_P, gradient_P)
    assert isinstance(by_products.curvature, CurvatureProducts)
    columns_PP = torch.stack([by_products.curvature.times(one_P) for one_P in torch.eye(5).double()])
    torch.testing.assert_close(columns_PP, hessian_PP)
    assert bool((hessian_PP.diag().abs() <= by_products.curvature.size_P).all())


def drawn(experts: int, blocks: int = 20) -> torch.Tensor:
    """Scores of experts of which some are rarely right."""
    truth_E = np.random.default_rng(0).dirichlet(np.full(experts, 0.5)) + 1e-9
    return drawn_from_a_calibrated_mixture(np.log(truth_E), 0.4, 0.9, blocks, 32, random_seed=32)


def all_alike(experts: int, differ: float) -> torch.Tensor:
    """Scores of one expert under many names, but for a little."""
    one = made_up_scores(1, 6, 32, random_seed=31).repeat(experts, 1, 1)
    return one - differ * torch.rand(one.shape, generator=torch.Generator().manual_seed(0)).double()


def with_hopeless(logp_EBT: torch.Tensor, hopeless: int) -> torch.Tensor:
    """The same scores, and those of experts that know nothing of the text."""
    return torch.cat([logp_EBT, torch.full((hopeless, *logp_EBT.shape[1:]), -1e4, dtype=torch.float64)])


MANY_EXPERTS = {
    "of a mixture": lambda: drawn(40, blocks=60),
    "of all sorts": lambda: made_up_scores(150, 12, 64, random_seed=33, spread=2.0),
    "all the same": lambda: all_alike(150, differ=0.0),
    "nearly the same": lambda: all_alike(150, differ=1e-6),
    "a few, over and over": lambda: drawn(5).repeat(30, 1, 1),
    "mostly hopeless": lambda: with_hopeless(drawn(5), 60),
    "on few tokens": lambda: with_hopeless(made_up_scores(20, 1, 16, random_seed=36), 20),
}


@pytest.mark.parametrize("experts", MANY_EXPERTS)
def test_many_experts_are_calibrated_without_a_matrix_as_well_as_with_one(
    experts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logp_EBT = MANY_EXPERTS[experts]()
    mask_BT = everything(logp_EBT)
    losses, weights = [], []
    for most in (1000, 1):
        monkeypatch.setattr(mixture_likelihood, "MOST_EXPERTS_OF_WHOLE", most)
        prior_E, posterior = calibrate(logp_EBT, mask_BT, CALIBRATED)
        assert float(prior_E.exp().sum()) == pytest.approx(1, rel=1e-9)
        losses.append(loss_of(logp_EBT, mask_BT, prior_E, posterior))
        weights.append(posterior.weight)
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert weights[1] == pytest.approx(weights[0], rel=1e-2, abs=1e-4)


def test_the_evidence_weight_alone_of_many_experts_is_that_of_few() -> None:
    # 30 times the same five experts, under a prior that is as even, are those five.
    few = drawn(5)
    _, expected = calibrate(few, everything(few), CALIBRATED, uniform_prior(few))
    many = few.repeat(30, 1, 1)
    _, found = calibrate(many, everything(many), CALIBRATED, uniform_prior(many))
    assert found.weight == pytest.approx(expected.weight, rel=1e-4)


@pytest.mark.parametrize("random_seed", range(24))
def test_without_a_matrix_too_calibrating_is_never_worse_than_em_nor_than_a_grid_around_it(
    random_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture_likelihood, "MOST_EXPERTS_OF_WHOLE", 0)
    test_calibrating_is_never_worse_than_em_without_evidence_nor_than_a_grid_around_it(random_seed)


def test_a_fit_on_many_tokens_starts_on_few_of_them_and_ends_at_the_same_maximum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logp_EBT = drawn_from_a_calibrated_mixture(
        np.log([0.5, 0.3, 0.2]), weight=0.4, discount=0.9, blocks=60, tokens=64, random_seed=27
    )
    mask_BT = everything(logp_EBT)
    at_once = calibrate(logp_EBT, mask_BT, CALIBRATED)
    monkeypatch.setattr(calibration, "STARTING_TOKENS", 200)
    by_few = calibrate(logp_EBT, mask_BT, CALIBRATED)
    found, expected = (loss_of(logp_EBT, mask_BT, *fit) for fit in (by_few, at_once))
    assert found == pytest.approx(expected, abs=1e-7)
    assert by_few[1].weight == pytest.approx(at_once[1].weight, rel=1e-3)


def test_calibrating_under_a_given_prior_fits_the_evidence_weight_alone() -> None:
    truth = np.log([0.5, 0.3, 0.2])
    logp_EBT = drawn_from_a_calibrated_mixture(
        truth, weight=0.4, discount=0.9, blocks=200, tokens=128, random_seed=25
    )
    given_E = torch.from_numpy(truth)
    prior_E, posterior = calibrate(logp_EBT, everything(logp_EBT), CALIBRATED, given_E)
    torch.testing.assert_close(prior_E, given_E)
    assert posterior.weight == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize("random_seed", range(24))
def test_calibrating_is_never_worse_than_em_without_evidence_nor_than_a_grid_around_it(
    random_seed: int,
) -> None:
    # Few blocks, sharp or hopeless experts, padding: where a fit goes wrong if it ever does.
    experts, blocks = [1, 2, 4, 8][random_seed % 4], [1, 2, 3, 20][random_seed // 4 % 4]
    logp_EBT = made_up_scores(experts, blocks, 32, 200 + random_seed, spread=[0.3, 2.0, 6.0][random_seed % 3])
    mask_BT = everything(logp_EBT)
    mask_BT[-1, -9:] = False
    logp_EBT[:, ~mask_BT] = 0.0
    if random_seed % 5 == 0 and experts > 1:
        logp_EBT[0, mask_BT] -= [30.0, 1e4][random_seed % 2]
    prior_E, posterior = calibrate(logp_EBT, mask_BT, CALIBRATED)
    found = loss_of(logp_EBT, mask_BT, prior_E, posterior)
    em_E = fitted_prior(logp_EBT, mask_BT)
    assert math.isfinite(found)
    assert found <= loss_of(logp_EBT, mask_BT, em_E, replace(CALIBRATED, weight=0.0)) + 2e-6
    for weight in (0.003, 0.03, 0.1, 0.22, 0.5, 1.0):
        for shift in [torch.zeros(experts).double(), *torch.eye(experts).double()]:
            nearby_E = torch.log_softmax(prior_E.clamp(min=-30) + shift / 2, dim=0)
            assert found <= loss_of(logp_EBT, mask_BT, nearby_E, replace(CALIBRATED, weight=weight)) + 1e-4
    assert float(prior_E.exp().sum()) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "late", "steady", "bad", "good"),
    [(32, 8, -3.0, -11.0, -2.0), (16, 4, -3.0, -11.0, -2.0), (32, 8, -5.0, -205.0, -1.0)],
)
def test_calibrating_is_not_caught_by_an_expert_that_is_bad_only_in_the_beginning(
    tokens: int, late: int, steady: float, bad: float, good: float
) -> None:
    # One block; expert 1 is much worse for its first tokens and better ever after. Climbing from the default
    # evidence weight alone ended 0.3 nats per token below mixture weights without any evidence (the first
    # case), or at β = inf and a prior of nan (the second); from the second start, too, 2.4 nats below in the
    # third.
    logp_EBT = torch.full((2, 1, tokens), steady, dtype=torch.float64)
    logp_EBT[1, 0, :late] = bad
    logp_EBT[1, 0, late:] = good
    posterior = Posterior("calibrated", discount=1.0)
    prior_E, fitted = calibrate(logp_EBT, everything(logp_EBT), posterior)
    found = loss_of(logp_EBT, everything(logp_EBT), prior_E, fitted)
    em_E = fitted_prior(logp_EBT, everything(logp_EBT))
    assert found <= loss_of(logp_EBT, everything(logp_EBT), em_E, replace(posterior, weight=0.0)) + 2e-6


def test_calibrating_one_expert_or_twins_gives_what_there_is_to_give() -> None:
    one = made_up_scores(1, 3, 16, random_seed=26)
    prior_E, posterior = calibrate(one, everything(one), CALIBRATED)
    assert prior_E.tolist() == [0.0]
    torch.testing.assert_close(log_mixture(one, prior_E, posterior), one[0])
    twins = one.expand(2, 3, 16)
    prior_E, posterior = calibrate(twins, everything(twins), CALIBRATED)
    torch.testing.assert_close(log_mixture(twins, prior_E, posterior), one[0])


def test_calibrating_on_nothing_gives_a_uniform_prior_and_the_default_weight() -> None:
    nothing = torch.zeros(3, 0, 8, dtype=torch.float64)
    prior_E, posterior = calibrate(nothing, everything(nothing), CALIBRATED)
    assert prior_E.exp().tolist() == pytest.approx([1 / 3] * 3)
    assert posterior.weight == DEFAULT_EVIDENCE_WEIGHT


def test_a_hopeless_expert_does_not_change_what_calibrating_finds_for_the_others() -> None:
    logp_EBT = drawn_from_a_calibrated_mixture(
        np.log([0.6, 0.4]), weight=0.3, discount=0.9, blocks=60, tokens=64, random_seed=27
    )
    with_hopeless = torch.cat([logp_EBT, torch.full((1, 60, 64), -1e4, dtype=torch.float64)])
    prior_E, posterior = calibrate(logp_EBT, everything(logp_EBT), CALIBRATED)
    disturbed_E, disturbed = calibrate(with_hopeless, everything(logp_EBT), CALIBRATED)
    assert disturbed_E[2].exp() < 1e-3
    expected = loss_of(logp_EBT, everything(logp_EBT), prior_E, posterior)
    assert loss_of(with_hopeless, everything(logp_EBT), disturbed_E, disturbed) == pytest.approx(
        expected, abs=1e-3
    )


def test_padding_plays_no_part_in_calibrating() -> None:
    logp_EBT = made_up_scores(3, 6, 24, random_seed=28)
    padded = torch.cat([logp_EBT, torch.zeros(3, 6, 9, dtype=torch.float64)], dim=-1)
    mask_BT = torch.cat([everything(logp_EBT), torch.zeros(6, 9, dtype=torch.bool)], dim=-1)
    expected_E, expected = calibrate(logp_EBT, everything(logp_EBT), CALIBRATED)
    found_E, found = calibrate(padded, mask_BT, CALIBRATED)
    torch.testing.assert_close(found_E, expected_E)
    assert found.weight == pytest.approx(expected.weight)


def test_calibrating_under_a_prior_that_rules_an_expert_out_keeps_it_out() -> None:
    logp_EBT = made_up_scores(3, 6, 24, random_seed=29)
    given_E = keep_top(made_up_prior(3, random_seed=30), 2)
    prior_E, posterior = calibrate(logp_EBT, everything(logp_EBT), CALIBRATED, given_E)
    torch.testing.assert_close(prior_E, given_E)
    assert math.isfinite(posterior.weight)


@pytest.mark.parametrize("tokens", [1, 32, 33, 64, 1100])
def test_discounted_sums_are_those_of_a_pass_token_by_token(tokens: int) -> None:
    """Of texts as long as a stretch, a token more, and as stretches of stretches."""
    logp_EBT = made_up_scores(experts=3, blocks=2, tokens=tokens, random_seed=28)
    for discount in (0.0, 0.5, 0.97, 1.0):
        now_EB, expected = torch.zeros(3, 2, dtype=torch.float64), []
        for t in range(tokens):
            expected.append(now_EB)
            now_EB = discount * now_EB + logp_EBT[..., t]
        found_EBT = discounted_sums(logp_EBT, [discount])[0]
        torch.testing.assert_close(found_EBT, torch.stack(expected, dim=-1), rtol=1e-12, atol=1e-12)
