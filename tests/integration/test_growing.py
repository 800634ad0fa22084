"""The main job in one process, on tiny real models."""

from pathlib import Path
from typing import Any

import pytest

from btm_cluster.algorithm import branch, grow, merge, train
from btm_cluster.commands.run import show_run
from btm_cluster.driver.driver import step_error
from btm_cluster.driver.preparation import prepare
from btm_cluster.errors import FoundationError, StepError, UserError
from btm_cluster.evaluation.rows import CALIBRATED_ENSEMBLE, PAPER_ENSEMBLE, SEED, TRANSFORMER_LM
from btm_cluster.evaluation.verdict import verdict
from btm_cluster.operations.evaluate import evaluate_forest
from btm_cluster.operations.rollback import rollback
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from tests.conftest import DOMAINS, in_process, made_up_documents, write_jsonl
from tests.integration.conftest import GrownForest


def test_a_run_grows_an_expert_for_each_domain_and_running_it_again_makes_nothing(plan: Plan) -> None:
    first = run_plan(plan, in_process(plan))
    assert first.forest.domains == tuple(sorted(DOMAINS))
    again = run_plan(plan, in_process(plan))
    assert again.forest == first.forest
    assert not again.made


def test_a_domain_added_later_branches_from_the_posterior_average_and_the_others_stay(
    fields: dict[str, Any],
) -> None:
    fields["domains"], later = fields["domains"][:2], fields["domains"]
    plan = Plan.model_validate(fields)
    before = grow(plan, in_process(plan)).forest
    plan = Plan.model_validate(fields | {"domains": later})
    after = grow(plan, in_process(plan)).forest
    assert after.version == before.version + 1
    assert [e for e in after.experts if e.domain in before.domains] == list(before.experts)
    added = after.expert(DOMAINS[2])
    assert {parent.identity for parent in added.parents} <= {e.identity for e in before.experts}
    assert abs(sum(parent.weight for parent in added.parents) - 1) < 1e-9


def test_a_later_domain_whose_text_changed_is_refused_before_anything_is_trained(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    fields["domains"], later = fields["domains"][:2], fields["domains"][2]
    plan = Plan.model_validate(fields)
    grow(plan, in_process(plan))
    text = write_jsonl(tmp_path / "later.jsonl", made_up_documents("later", 200))
    plan = Plan.model_validate(fields | {"domains": [*fields["domains"], later | {"text": str(text)}]})
    grow(plan, in_process(plan))
    write_jsonl(text, made_up_documents("something else", 200))
    driver = in_process(plan)
    with pytest.raises(UserError, match="already stands in forest version 2"):
        grow(plan, driver)
    assert set(driver.made) == {"source"}


def test_a_domain_that_was_renamed_in_the_plan_is_refused_before_anything_is_trained(
    fields: dict[str, Any],
) -> None:
    """It got a second expert of the same documents, and the seed was said never to have seen them."""
    fields["domains"] = fields["domains"][:2]
    plan = Plan.model_validate(fields)
    grow(plan, in_process(plan))
    (first, *others), known = fields["domains"], fields["domains"][0]["name"]
    plan = Plan.model_validate(fields | {"domains": [first | {"name": "renamed"}, *others]})
    driver = in_process(plan)
    with pytest.raises(UserError, match=f"'renamed' has the same documents as '{known}'"):
        grow(plan, driver)
    assert "model" not in driver.made


def test_a_plan_may_leave_out_founding_domains_and_their_experts_stay(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields)
    forest = grow(plan, in_process(plan)).forest
    smaller = Plan.model_validate(fields | {"domains": fields["domains"][:1]})
    run = run_plan(smaller, in_process(smaller))
    assert run.forest == forest


def test_experts_stay_when_branching_changes_and_a_run_names_them(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    two = fields | {"domains": fields["domains"][:2]}
    plan = Plan.model_validate(two)
    assert run_plan(plan, in_process(plan)).trained_otherwise == ()
    plan = Plan.model_validate(two | {"branching": {"learning_rate_scale": 2.0}})
    run = run_plan(plan, driver := in_process(plan))
    assert (run.trained_otherwise, driver.made["model"]) == (tuple(sorted(DOMAINS[:2])), 0)
    plan = Plan.model_validate(fields | {"branching": {"learning_rate_scale": 2.0}})
    run = run_plan(plan, in_process(plan))
    assert run.trained_otherwise == tuple(sorted(DOMAINS[:2])), "the later one is trained by it"
    plan = Plan.model_validate(fields | {"branching": {"start": "uniform", "learning_rate_scale": 3.0}})
    run = run_plan(plan, in_process(plan))
    assert run.trained_otherwise == tuple(sorted(DOMAINS)), "where the later one started is its own matter"
    show_run(run, json_output=False, details=False)
    assert f"these stay as they were trained: {', '.join(sorted(DOMAINS))};" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_changed_tokenizer_is_refused_before_a_token_is_made(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields)
    grow(plan, in_process(plan))
    changed = Plan.model_validate(fields | {"tokenizer": {"train": {"vocabulary": 340}}})
    driver = in_process(changed)
    with pytest.raises(FoundationError, match=r"tokenizer\.train\.vocabulary: 320 → 340\n"):
        grow(changed, driver)
    assert not driver.made


def test_a_model_that_sees_what_it_predicts_is_refused(fields: dict[str, Any]) -> None:
    bert = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    plan = Plan.model_validate(fields | {"model": {"config": bert}})
    with pytest.raises(UserError, match="no causal language model"):
        grow(plan, in_process(plan))


def test_two_drivers_that_add_one_domain_from_different_versions_end_in_one_forest(
    fields: dict[str, Any],
) -> None:
    fields["domains"], all_domains = fields["domains"][:1], fields["domains"]
    founding = Plan.model_validate(fields)
    first = in_process(founding)
    grown = grow(founding, first)
    both = Plan.model_validate(fields | {"domains": all_domains[:2]})
    second = in_process(both)
    prepared = prepare(both, second)
    late, failures = train(branch(prepared, grown.forest, second), second)
    assert not failures
    winner = Plan.model_validate(fields | {"domains": all_domains[:2], "branching": {"start": "seed"}})
    merged = grow(winner, in_process(winner)).forest
    assert merge(grown.forest, late, second.ledger) == merged


def test_an_expert_that_diverges_is_told_what_can_still_be_changed(fields: dict[str, Any]) -> None:
    # The learning rate is the seed's too: a plan that lowers it is refused, since the seed stands.
    plan = Plan.model_validate(
        fields | {"domains": fields["domains"][:1], "branching": {"learning_rate_scale": 1e30}}
    )
    with pytest.raises(StepError, match=r"remedy: +lower `branching\.learning_rate_scale`"):
        run_plan(plan, in_process(plan))
    failures = grow(plan, in_process(plan)).failures
    assert (
        step_error(failures).remedy
        == "change what each of them names; the same would come of the same recipe"
    )
    calmer = Plan.model_validate(fields | {"domains": fields["domains"][:1]})
    assert grow(calmer, in_process(calmer)).forest.domains == (DOMAINS[0],)


def test_a_forest_without_an_expert_is_told_how_to_get_some(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:1]})
    grow(plan, driver := in_process(plan))
    rollback(driver.ledger, 0)
    with pytest.raises(UserError, match=r"forest version 2 in .* has no expert") as refused:
        evaluate_forest(plan, in_process(plan))
    assert "btm forest remove DOMAIN --undo" in refused.value.remedy


def test_a_text_that_fills_no_block_is_not_advised_shorter_blocks_where_a_forest_has_settled_them(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    short = {
        "name": "short",
        "text": str(write_jsonl(tmp_path / "short.jsonl", [f"{'a' * i}" for i in range(1, 9)])),
    }
    reading = {"development_share": 0.3, "test_share": 0.3}
    for domains, remedy in (
        ([short, *fields["domains"][:1]], "give it more text, or lower `training.block_tokens`"),
        (fields["domains"][:1], ""),
        ([short, *fields["domains"][:1]], "give it more text"),
    ):
        plan = Plan.model_validate(fields | {"domains": domains, "reading": reading})
        if not remedy:
            grow(plan, in_process(plan))
            continue
        with pytest.raises(UserError, match="fills no block") as refused:
            prepare(plan, in_process(plan))
        assert refused.value.remedy == remedy


def test_a_real_forests_verdict_has_every_system_on_every_text(grown: GrownForest) -> None:
    found = verdict(grown.evaluation.results)
    systems = {row.system for row in found.rows["test"]}
    assert {
        SEED,
        TRANSFORMER_LM,
        PAPER_ENSEMBLE,
        CALIBRATED_ENSEMBLE,
        "average, uniform",
        "average, posterior",
    } <= systems
    for row in found.rows["test"]:
        wanted = {"kitchen", "harbour", "orchard"} | (
            {"market"} if row.system != "the domain's own expert" else set()
        )
        assert set(row.cells) == wanted
    best = {
        text: row.cells[text].perplexity
        for row in found.rows["test"]
        for text in row.cells
        if row.system == SEED
    }
    assert all(1 < perplexity < 320 for perplexity in best.values())
