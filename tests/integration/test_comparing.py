"""What a living forest is compared on: texts that its rivals learned from too, and those that nobody did."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from btm_cluster.commands.run import show_run
from btm_cluster.errors import UserError
from btm_cluster.evaluation.rows import (
    CALIBRATED_ENSEMBLE,
    POSTERIOR_AVERAGE,
    TRANSFORMER_LM,
    UNIFORM_AVERAGE,
    is_ensemble,
)
from btm_cluster.ledger import Ledger
from btm_cluster.operations.evaluate import evaluate_forest
from btm_cluster.operations.expand import expand
from btm_cluster.operations.plan import DONE, preview
from btm_cluster.operations.remove import bring_back, remove
from btm_cluster.operations.rollback import rollback
from btm_cluster.operations.run import Run, run_plan
from btm_cluster.plan import Plan
from tests.conftest import in_process, made_up_documents, write_jsonl
from tests.living import deliver


@pytest.fixture
def plan(founded_plan: Plan, tmp_path: Path) -> Plan:
    """A plan whose forest of kitchen and harbour stands beside its
    Transformer-LM, with a store of the test's own."""
    shutil.copytree(founded_plan.store, tmp_path / "store")
    return founded_plan.model_copy(update={"store": str(tmp_path / "store")})


@pytest.fixture
def ledger(plan: Plan) -> Ledger:
    return Ledger.open(plan.store)


@pytest.fixture
def arrive(ledger: Ledger, tmp_path: Path) -> Callable[..., None]:
    """Delivers a domain."""
    return lambda name, *documents: deliver(ledger, tmp_path, name, *documents)


def changed(plan: Plan, **sections: Any) -> Plan:
    """The plan with other sections."""
    return Plan.model_validate(plan.model_dump(mode="json") | sections)


def scores_of(plan: Plan) -> str:
    """Their state in `btm plan`."""
    return next(step.state for step in preview(plan, Ledger.open(plan.store)).steps if step.name == "scores")


def differences(run: Run) -> dict[str, float]:
    """The calibrated ensemble's, to the Transformer-LM, on the test text of
    each text that they are compared on."""
    row = next(row for row in run.verdict.rows["test"] if row.system == CALIBRATED_ENSEMBLE)
    return {text: cell.difference for text, cell in row.cells.items() if cell.difference is not None}


def test_a_forest_is_compared_on_what_its_rivals_learned_from_too_or_nobody_did(
    plan: Plan, arrive: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    # The Transformer-LM never saw what was added. Counted in, one such text made a lead of 24.5 % one of 65
    # %.
    founded = evaluate_forest(plan, in_process(plan))
    assert (founded.verdict.left_out, set(differences(founded))) == ({}, {"kitchen", "harbour", "market"})
    arrive("meadow")
    expand(plan, in_process(plan))
    parts = "five models on both splits of four texts, two milestones on the development text of two founding domains"
    assert scores_of(plan).endswith("of 44 new"), parts
    evaluated = evaluate_forest(plan, in_process(plan))
    assert scores_of(plan) == DONE
    assert evaluated.verdict.left_out == {"meadow": "added later"}
    assert set(differences(evaluated)) == {"kitchen", "harbour", "market"}
    rows = {row.system: row for row in evaluated.verdict.rows["test"]}
    forest, rival = rows[CALIBRATED_ENSEMBLE], rows[TRANSFORMER_LM]
    on_all = (
        mean(c.perplexity for c in forest.cells.values()) / mean(c.perplexity for c in rival.cells.values())
        - 1
    )
    judged = forest.means["all"].difference
    assert judged is not None
    assert on_all < judged - 0.02, "what it would have said"
    compared = [
        forest.cells[text].perplexity / rival.cells[text].perplexity - 1 for text in differences(evaluated)
    ]
    assert min(compared) < judged < max(compared)
    assert forest.means["left_out"].perplexity == forest.cells["meadow"].perplexity
    assert any(
        f"{row.means['all'].difference:+.1%}" in evaluated.verdict.sentence
        for row in rows.values()
        if is_ensemble(row.system)
    )
    assert (
        "Not compared on, since only one side learned from it: meadow (added later)."
        in evaluated.verdict.sentence
    )
    assert f"The {evaluated.verdict.baseline} never saw meadow." in evaluated.verdict.sentence
    assert evaluated.verdict.milestones == founded.verdict.milestones, "chosen by the founding domains alone"
    show_run(evaluated, json_output=False, details=True)
    shown = capsys.readouterr().out
    assert "founding domains" in shown
    assert "left out" in shown
    assert "(added later)" in shown
    assert run_plan(plan, in_process(plan)).to_json()["verdict"] == evaluated.to_json()["verdict"], (
        "run or evaluate"
    )


def test_a_baseline_that_the_plan_names_and_nobody_trained_is_told(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    both = changed(plan, baselines=["transformer-lm", "demix"])
    run = evaluate_forest(both, in_process(both))
    assert (run.missing_baselines, run.to_json()["missing_baselines"]) == (("demix",), ["demix"])
    show_run(run, json_output=False, details=False)
    assert "note: demix is not trained, and not compared with" in capsys.readouterr().out


def test_averages_that_are_weighted_uniformly_are_one_row_by_that_name(plan: Plan) -> None:
    uniform = changed(plan, merging={"average_prior": "uniform"})
    names = {row.system for row in evaluate_forest(uniform, in_process(uniform)).verdict.rows["test"]}
    assert UNIFORM_AVERAGE in names
    assert POSTERIOR_AVERAGE not in names


def test_a_target_of_an_added_domains_documents_is_not_compared_on(
    plan: Plan, arrive: Callable[..., None], tmp_path: Path
) -> None:
    documents = made_up_documents("meadow", 120)
    arrive("meadow", documents)
    known = write_jsonl(tmp_path / "known.jsonl", [*documents[:30], *made_up_documents("market", 30)])
    alike = write_jsonl(tmp_path / "alike.jsonl", made_up_documents("meadow", 150)[120:])
    targets = [{"name": "half-known", "text": str(known)}, {"name": "alike", "text": str(alike)}]
    plan = changed(plan, targets=targets)
    before = evaluate_forest(plan, in_process(plan))
    assert set(differences(before)) == {"kitchen", "harbour", "half-known", "alike"}
    expand(plan, in_process(plan))
    after = evaluate_forest(plan, in_process(plan))
    assert set(differences(after)) == {"kitchen", "harbour", "alike"}
    assert re.fullmatch(r"\d\d% of it in the training text of meadow", after.verdict.left_out["half-known"])
    meadow = [{"name": "meadow", "text": str(alike)}]
    with pytest.raises(UserError, match="the target 'meadow' has the name of a domain"):
        evaluate_forest(other := changed(plan, targets=meadow), in_process(other))


def test_a_founding_domain_that_was_taken_out_and_what_it_shares_with_a_target_are_not_compared_on(
    plan: Plan, ledger: Ledger, texts: dict[str, Path]
) -> None:
    remove(ledger, "harbour")
    plan = changed(plan, targets=[{"name": "port", "text": str(texts["harbour"])}])
    run = run_plan(plan, in_process(plan))
    assert run.verdict.left_out["harbour"] == "founding domain without an expert"
    assert "in the training text of harbour" in run.verdict.left_out["port"]
    assert set(differences(run)) == {"kitchen"}
    bring_back(ledger, "harbour")
    again = run_plan(plan, in_process(plan))
    assert (again.verdict.left_out, set(differences(again))) == ({}, {"kitchen", "harbour", "port"})


def test_a_forest_that_shares_no_text_with_its_rivals_is_not_judged(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    expand(plan, in_process(plan))
    rollback(ledger, 1)
    rolled_back = evaluate_forest(plan, in_process(plan))
    assert (rolled_back.verdict.left_out, set(differences(rolled_back))) == (
        {},
        {"kitchen", "harbour", "market"},
    )
    bring_back(ledger, "meadow")
    remove(ledger, "kitchen")
    remove(ledger, "harbour")
    meadow = ledger.storage.address("inbox/meadow")
    plan = changed(plan, targets=[], domains=[{"name": "meadow", "text": f"{meadow}/*.jsonl"}])
    sentence = evaluate_forest(plan, in_process(plan)).verdict.sentence
    assert "not compared with the Transformer-LM" in sentence
    assert "harbour, kitchen (founding domain without an expert)" in sentence
