"""What each expert is worth: against leaving it out by hand, and from cached scores alone."""

import json
import math
from typing import Any

import pytest
import torch

from btm_cluster.cli import app, run_command
from btm_cluster.equations.contribution import leave_one_out
from btm_cluster.equations.mixture import log_mixture
from btm_cluster.equations.perplexity import TOKENS
from btm_cluster.equations.posterior import Posterior
from btm_cluster.errors import UserError
from btm_cluster.ledger import Ledger
from btm_cluster.operations.contributions import contributions
from btm_cluster.plan import Plan
from tests.integration.conftest import GrownForest


@pytest.mark.parametrize(
    "posterior", [Posterior("calibrated", weight=0.3), Posterior("full")], ids=lambda p: p.kind
)
def test_leaving_each_out_at_once_is_leaving_them_out_one_by_one(posterior: Posterior) -> None:
    generator = torch.Generator().manual_seed(0)
    logp_EBT = -5 * torch.rand(4, 3, 16, generator=generator, dtype=torch.float64)
    log_prior_E = torch.log_softmax(torch.randn(4, generator=generator, dtype=torch.float64), 0)
    at_once_EBT = leave_one_out(logp_EBT, log_prior_E, posterior)
    for expert in range(4):
        others = [other for other in range(4) if other != expert]
        by_hand_BT = log_mixture(logp_EBT[others], log_prior_E[others].log_softmax(0), posterior)
        torch.testing.assert_close(at_once_EBT[expert], by_hand_BT, rtol=0, atol=1e-5)


def test_where_one_expert_has_the_whole_prior_the_others_take_over_evenly() -> None:
    logp_EBT = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)[:, None, None].expand(3, 1, 1)
    without_EBT = leave_one_out(
        logp_EBT, torch.tensor([0.0, -torch.inf, -torch.inf]).double(), Posterior("full")
    )
    assert float(without_EBT[0]) == pytest.approx(math.log((math.exp(-2) + math.exp(-4)) / 2))
    assert float(without_EBT[1]) == pytest.approx(-1, abs=1e-5)


def test_a_domains_own_expert_is_worth_most_to_it_and_nothing_is_made(
    grown: GrownForest, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = grown.driver.ledger
    before = {entry.key for entry in ledger.storage.list("")}
    found = contributions(ledger)
    assert [text.text for text in found.texts] == ["harbour", "kitchen", "orchard", "market"]
    assert [text.is_domain for text in found.texts] == [True, True, True, False]
    for text in found.texts[:3]:
        assert max(found.domains, key=text.rise) == text.text
        assert text.rise(text.text) > 0
    ensemble = {(r.text, r.split): r for r in grown.evaluation.results}["market", "test"]
    sums_U, sizes_U = ensemble.logp["ensemble, calibrated"].sum(1), ensemble.sizes_UD.sum(1)
    expected = math.exp(-float(sums_U[TOKENS] / sizes_U[TOKENS]))
    assert found.texts[3].perplexity == pytest.approx(expected, rel=1e-9)
    store = ("--store", ledger.storage.location)
    assert run_command(lambda: app(["forest", "contributions", *store])) == 0
    assert "without kitchen" in capsys.readouterr().out
    assert run_command(lambda: app(["forest", "contributions", *store, "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["domains"] == list(found.domains)
    assert {entry.key for entry in ledger.storage.list("")} == before


def test_a_store_without_a_forest_has_no_contributions(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no two experts"):
        contributions(Ledger.open(Plan.model_validate(fields).store))
