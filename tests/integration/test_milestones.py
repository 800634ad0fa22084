"""The Transformer-LM at its best milestone: how it is chosen, and that a run is judged against it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.driver.recipes import seed_request, transformer_lm_milestones, transformer_lm_request
from btm_cluster.equations.perplexity import TOKENS
from btm_cluster.evaluation.milestones import best_milestone, choose_milestone, milestone_scores
from btm_cluster.evaluation.rows import BEST_MILESTONE, SEED, TRANSFORMER_LM
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.ledger.records import list_baselines
from btm_cluster.operations.evaluate import evaluate_forest, find_grown
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.requests import Pretrained
from tests.conftest import in_process, made_up_documents, plan_fields, write_jsonl
from tests.integration.conftest import GrownForest, PreparedStore


def overtrained_fields(texts: dict[str, Path], folder: Path, seed_share: float) -> dict[str, Any]:
    """A plan whose training makes models worse at its domains' held-out
    text, which is in another language."""
    fields = plan_fields(texts, folder / "store")
    fields["domains"] = fields["domains"][:2]
    for domain in fields["domains"]:
        other = made_up_documents(f"elsewhere in {domain['name']}", 24)
        for split, documents in (("development", other[:12]), ("test", other[12:])):
            domain[split] = str(write_jsonl(folder / split / f"{domain['name']}.jsonl", documents))
    fields["training"] |= {"updates": 24, "seed_share": seed_share, "learning_rate": 1e-2}
    return fields | {"baselines": ["transformer-lm"]}


def scores_of(prepared: PreparedPlan, milestones: dict[int, Ref], ledger: Ledger) -> dict[Ref, Artifact]:
    return {request.ref: ledger.get(request.ref) for request in milestone_scores(prepared, milestones)}


@pytest.mark.parametrize(
    ("perplexities", "best"),
    [
        ({6: 3.0, 8: 2.0, 10: 2.5, 12: 2.1}, 8),
        ({6: 1.0, 8: 2.0, 10: 2.5, 12: 2.1}, 6),
        ({6: 3.0, 8: 2.0, 10: 2.5, 12: 1.9}, 12),
        ({6: 3.0, 8: 2.0, 10: 2.0, 12: 2.0}, 12),
        ({12: 4.0, 6: float("inf")}, 12),
    ],
)
def test_the_best_milestone_has_the_lowest_perplexity_and_of_equals_is_the_last(
    perplexities: dict[int, float], best: int
) -> None:
    assert best_milestone(perplexities) == best


@pytest.mark.parametrize(
    ("updates", "seed_share", "expected"),
    [
        (12, 0.5, [6, 8, 10, 12]),
        (1600, 0.75, [1200, 1333, 1467, 1600]),
        (10, 0.8, [8, 9, 10]),
        (10, 0.9, [9, 10]),
    ],
)
def test_milestones_are_the_seed_two_evenly_between_and_the_end(
    prepared_store: PreparedStore, updates: int, seed_share: float, expected: list[int]
) -> None:
    plan = prepared_store.prepared.plan
    training = plan.training.model_copy(update={"updates": updates, "seed_share": seed_share})
    prepared = replace(prepared_store.prepared, plan=plan.model_copy(update={"training": training}))
    seed = seed_request(prepared).ref
    milestones = transformer_lm_milestones(prepared, seed)
    assert list(milestones) == expected
    assert milestones[expected[0]] == seed
    assert milestones[updates] == transformer_lm_request(prepared, seed).ref


def test_a_pretrained_seed_is_a_milestone_though_no_training_passes_it(prepared_store: PreparedStore) -> None:
    prepared = replace(prepared_store.prepared, pretrained=Pretrained("elsewhere", "0" * 64))
    request = transformer_lm_request(prepared, seed_request(prepared).ref)
    assert (request.first_update, request.milestones, request.snapshots) == (6, (), (8, 10))
    assert list(transformer_lm_milestones(prepared, seed_request(prepared).ref)) == [6, 8, 10, 12]


def test_the_choice_is_by_the_mean_perplexity_on_development_text_of_domains_that_have_some(
    grown: GrownForest,
) -> None:
    prepared, ledger = grown.prepared, grown.driver.ledger
    milestones = transformer_lm_milestones(prepared, seed_request(prepared).ref)
    chosen = choose_milestone(prepared, milestones, ledger, scores_of(prepared, milestones, ledger))
    assert chosen == grown.evaluation.milestones
    first, *others = prepared.domains
    bare = replace(first, tokens={**first.tokens, "development": ()})
    few = replace(prepared, texts=(bare, *others, *(text for text in prepared.texts if text.is_target)))
    found = choose_milestone(few, milestones, ledger, scores_of(few, milestones, ledger))
    assert found is not None
    for update, model in milestones.items():
        stacks = [stack_of(ledger, [model], text, "development") for text in others]
        values = [
            math.exp(-float(stack.sums()[0, TOKENS].sum() / stack.sizes()[TOKENS].sum())) for stack in stacks
        ]
        assert found.perplexities[update] == pytest.approx(sum(values) / len(values))
    none = replace(
        prepared, texts=tuple(replace(t, tokens={**t.tokens, "development": ()}) for t in prepared.texts)
    )
    assert milestone_scores(none, milestones) == []
    assert choose_milestone(none, milestones, ledger, {}) is None


@pytest.mark.parametrize(("seed_share", "best"), [(0.5, 12), (0.17, 11)], ids=["the seed", "one between"])
def test_a_forest_is_judged_against_the_milestone_that_was_better_than_the_end(
    texts: dict[str, Path], tmp_path: Path, seed_share: float, best: int
) -> None:
    # On held-out domains trained for 13 passes the seed beat the finished Transformer-LM by 10 %: an easy
    # rival.
    plan = Plan.model_validate(overtrained_fields(texts, tmp_path, seed_share))
    found = run_plan(plan, in_process(plan)).verdict
    assert found.milestones is not None
    assert (found.milestones.best, found.milestones.last) == (best, 24)
    assert found.baseline == BEST_MILESTONE
    assert f"Transformer-LM is the one at update {best}: " in found.sentence
    for split, of_split in found.rows.items():
        rows = {row.system: row for row in of_split}
        assert list(rows)[1:3] == [TRANSFORMER_LM, BEST_MILESTONE]
        own, seed = (
            {t: cell.perplexity for t, cell in rows[name].cells.items()} for name in (BEST_MILESTONE, SEED)
        )
        assert (own == seed) == (best == 12), split
        difference = rows[TRANSFORMER_LM].means["domains"].difference
        assert difference is not None
        assert difference > 0.01, "the finished one is worse on each split"
    again = in_process(plan)
    assert run_plan(plan, again).verdict.to_json() == found.to_json()
    assert not again.made
    evaluated = evaluate_forest(plan, again).verdict
    assert evaluated.to_json() == found.to_json()


def test_every_milestone_is_recorded_as_a_baseline_so_that_none_is_collected(grown: GrownForest) -> None:
    prepared, ledger = grown.prepared, grown.driver.ledger
    seed, *others = transformer_lm_milestones(prepared, seed_request(prepared).ref).values()
    recorded = {one.model: (one.name, one.version) for one in list_baselines(ledger)}
    assert recorded == {ref.identity: ("transformer-lm", 1) for ref in others}
    assert seed.identity == grown.grown.forest.foundation.seed


def test_an_evaluation_goes_without_a_transformer_lm_that_lacks_a_milestone(
    prepared_store: PreparedStore,
) -> None:
    plan, driver = prepared_store.prepared.plan, prepared_store.driver
    run_plan(plan, driver)
    request = prepared_store.transformer_lm
    lost = request.at_snapshots[-1].ref
    Path(Ledger.open(plan.store).storage.location, "artifacts", "model", f"{lost.identity}.json").unlink()
    assert find_grown(plan, in_process(plan)).baseline is None
    run = run_plan(plan, again := in_process(plan))
    assert run.missing_baselines == ()
    assert again.made["model"] == 1, "it is trained once more"
    assert find_grown(plan, in_process(plan)).baseline == request.ref
