"""Averages with fitted weights: the search against finite differences and its
starts, through the real step on tiny models."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.recipes import expert_resources
from btm_cluster.equations.averaging import greedy_weights
from btm_cluster.errors import IncompatibleError, TextError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import average_request, scores_for, soup_request, weight_requests
from btm_cluster.evaluation.scoring import score_models, stack_of
from btm_cluster.evaluation.systems import Ensemble, with_seed
from btm_cluster.language_model.soup import (
    HELD_OUT_EVERY,
    Reading,
    SearchedWeights,
    Soup,
    greedy_soup,
    learned_soup,
    softmax_slope,
)
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.operations.gc import find_garbage
from btm_cluster.steps.stored import open_config, open_held_out, open_model, open_weights
from tests.conftest import in_process, run_all
from tests.integration.conftest import GrownForest, copy_store
from tests.made import origin


def models_of(grown: GrownForest) -> list[Artifact]:
    """The experts and their seed, in the order of an average's recipe."""
    seed = grown.driver.ledger.get(Ref("model", grown.grown.forest.foundation.seed))
    return sorted([*grown.experts, seed], key=lambda model: model.identity)


@pytest.fixture(scope="module")
def soup(grown: GrownForest) -> Soup:
    """The experts and the seed, ready to be mixed."""
    ledger, models = grown.driver.ledger, models_of(grown)
    config = open_config(ledger, models[0])
    parts = [open_weights(ledger, model) for model in models]
    return Soup(
        open_model(ledger, models[0]), parts, config["eos_token_id"], expert_resources(grown.prepared.plan)
    )


@pytest.fixture(scope="module")
def reading(grown: GrownForest) -> Reading:
    """Development blocks of a target, the last one padded."""
    held_out = open_held_out(grown.driver.ledger, grown.text("market").tokens["development"], 100)
    return Reading(*map(torch.from_numpy, held_out))


def one_hots(count: int) -> list[list[float]]:
    return [[float(i == j) for i in range(count)] for j in range(count)]


def test_the_loss_of_a_single_expert_is_that_of_its_stored_scores(
    grown: GrownForest, soup: Soup, reading: Reading
) -> None:
    assert not reading.mask_BT.all(), "padding is part of this test"
    driver, prepared = grown.driver, grown.prepared
    models, market = [model.ref for model in models_of(grown)], grown.text("market")
    score_models(prepared, dict.fromkeys(models, "an expert"), [market], driver, ["development"])
    for one_hot, model in zip(one_hots(len(soup)), models, strict=True):
        stored = stack_of(driver.ledger, [model], market, "development").take(0, 100)[0][0]
        expected = -float(stored[reading.mask_BT].mean())
        assert soup.loss(one_hot, reading) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_the_weights_equals_finite_differences(soup: Soup, reading: Reading) -> None:
    weights = [0.4, 0.3, 0.2, 0.1]
    found = soup.gradient(weights, reading)
    step = 1e-2  # float32 losses: smaller steps drown in rounding
    for j in range(len(weights)):
        up, down = ([w + sign * step * (i == j) for i, w in enumerate(weights)] for sign in (1, -1))
        expected = (soup.loss(up, reading) - soup.loss(down, reading)) / (2 * step)
        assert float(found[j]) == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_the_slope_of_softmax_logits_is_autograds() -> None:
    logits_E = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    slope_E = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (slope_E * torch.softmax(logits_E, dim=0)).sum().backward()  # type: ignore[no-untyped-call]
    assert logits_E.grad is not None
    torch.testing.assert_close(softmax_slope(slope_E, torch.softmax(logits_E.detach(), dim=0)), logits_E.grad)


def test_a_greedy_soup_takes_experts_in_their_own_order_while_the_average_gets_better() -> None:
    # Judged by the distance of the average of these points to 2.5: 3 is best alone, 2 mends it, 9 does not, 0
    # would not.
    points, tried = [9.0, 2.0, 3.1, 0.0], []

    def loss(weights: object) -> float:
        tried.append(weights)
        return abs(sum(w * p for w, p in zip(weights, points, strict=True)) - 2.5)  # type: ignore[call-overload]

    weights, best = greedy_weights(loss, 4)
    assert weights == [0.0, 0.5, 0.5, 0.0]
    assert best == pytest.approx(0.05)
    assert len(tried) == 4 + 3


def test_a_greedy_soup_is_never_worse_on_its_blocks_than_the_best_expert(
    soup: Soup, reading: Reading
) -> None:
    found = greedy_soup(soup, reading)
    alone = [soup.loss(one_hot, reading) for one_hot in one_hots(len(soup))]
    assert found.loss <= min(alone)
    assert sum(found.weights) == pytest.approx(1, abs=1e-9)
    assert soup.loss(found.weights, reading) == pytest.approx(found.loss, rel=1e-4)


def held_out(reading: Reading) -> Reading:
    return reading.take(torch.arange(len(reading)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)


def test_a_learned_soup_is_never_worse_than_its_starts_on_the_blocks_held_out(
    soup: Soup, reading: Reading
) -> None:
    given, reading = [0.1, 0.2, 0.3, 0.4], reading.take(torch.arange(10))
    found = learned_soup(soup, reading, [given])
    best_expert = min(one_hots(len(soup)), key=lambda weights: soup.loss(weights, reading))
    starts = [soup.loss(start, held_out(reading)) for start in (given, [0.25] * 4, best_expert)]
    assert found.loss < min(starts), "on these models there is something to find"
    assert found.loss == pytest.approx(soup.loss(found.weights, held_out(reading)), rel=1e-6)
    assert sum(found.weights) == pytest.approx(1, abs=1e-9)
    assert min(found.weights) >= 0
    again = learned_soup(soup, reading, [given])
    assert again == found


def test_a_single_block_is_enough_to_search_on(soup: Soup, reading: Reading) -> None:
    found = learned_soup(soup, reading.take(torch.arange(1)))
    assert isinstance(found, SearchedWeights)
    assert sum(found.weights) == pytest.approx(1, abs=1e-9)


# The step


def ensemble_of(grown: GrownForest) -> Ensemble:
    """The experts and the seed, in the order of `models_of`."""
    ensemble = with_seed(forest_ensemble(grown.prepared, grown.grown.forest))
    return dataclasses.replace(
        ensemble, models=tuple(sorted(ensemble.models, key=lambda model: model[1].identity))
    )


@pytest.fixture
def store(grown: GrownForest, tmp_path: Path) -> Driver:
    """A copy of the grown forest's store, to be added to."""
    return in_process(copy_store(grown.prepared.plan, tmp_path / "store"))


def test_a_search_commits_weights_from_which_the_average_is_made(
    grown: GrownForest, store: Driver, soup: Soup, reading: Reading
) -> None:
    models = ensemble_of(grown).refs
    request = soup_request(grown.prepared, ensemble_of(grown), "greedy", grown.text("market"))
    (found,) = store.require([request])
    assert found.ref == request.ref
    assert found.facts["blocks"] == len(reading)
    expected = greedy_soup(soup, reading)
    weights = dict(zip([m.identity for m in models], expected.weights, strict=True))
    assert found.facts["weights"] == {"greedy": weights}
    (average,) = store.require(
        [average_request(grown.prepared, ensemble_of(grown), "greedy", grown.text("market"))]
    )
    assert average.facts["weights"] == {identity: weight for identity, weight in weights.items() if weight}
    model = open_model(store.ledger, average)
    alone = Soup(
        model,
        [open_weights(store.ledger, average)],
        open_config(store.ledger, average)["eos_token_id"],
        request.how,
    )
    assert alone.loss([1.0], reading) == pytest.approx(found.facts["loss"], rel=1e-4)
    going = find_garbage(store.ledger, keep_versions=1, grace_seconds=0)
    assert not any(found.identity in key for key in going.manifests), (
        "gc keeps a search on models that it keeps"
    )


def test_the_order_of_models_names_no_other_search_and_starts_strategy_and_blocks_do(
    grown: GrownForest,
) -> None:
    ensemble, text = ensemble_of(grown), grown.text("market")
    request = soup_request(grown.prepared, ensemble, "learned", text)
    assert request.starts, "a learned search sets out from the prior's average too"
    turned = dataclasses.replace(request, models=request.models[::-1])
    assert turned.ref == request.ref
    assert json.dumps(request.recipe) == json.dumps(turned.recipe)
    others = [
        dataclasses.replace(request, starts=()),
        dataclasses.replace(request, starts=(dataclasses.replace(request.starts[0], name="ema"),)),
        soup_request(grown.prepared, ensemble, "greedy", text),
        dataclasses.replace(request, models=request.models[:3]),
        dataclasses.replace(request, blocks=3),
    ]
    assert len({request.ref, *(other.ref for other in others)}) == 6


def test_a_learned_search_passes_its_starts_on_by_model(grown: GrownForest, store: Driver) -> None:
    ensemble, text = ensemble_of(grown), grown.text("market")
    request = soup_request(grown.prepared, ensemble, "learned", text)
    backwards = dataclasses.replace(request, models=request.models[::-1], blocks=6)
    fits = weight_requests(grown.prepared, ensemble, "fitted", text)
    *_, found = store.require([*scores_for(grown.prepared, ensemble, text), *fits, backwards])
    weights = found.facts["weights"]["learned"]
    assert weights.keys() == {model.identity for model in ensemble.refs}
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert found.facts["blocks"] == 6


def test_models_without_a_common_ancestor_or_without_text_are_refused(
    grown: GrownForest, store: Driver
) -> None:
    expert, text = grown.experts[0], grown.text("market")
    files = {blob.name: store.ledger.open_file(expert, blob.name) for blob in expert.blobs}
    stranger = store.ledger.commit(origin("model", {"stranger": 1}), files, {"origin": "of another seed"})
    request = soup_request(grown.prepared, ensemble_of(grown), "greedy", text)
    with pytest.raises(IncompatibleError):
        run_all(store.workers, [dataclasses.replace(request, models=(expert.ref, stranger.ref))])
    nothing = dataclasses.replace(request, tokens=())
    with pytest.raises(TextError):
        run_all(store.workers, [nothing])
