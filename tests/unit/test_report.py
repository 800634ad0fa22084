"""The verdict: what it says of systems whose differences are known."""

import json
import math

import numpy as np
import pytest
import torch

from btm_cluster.curve import Rise
from btm_cluster.evaluation.judgement import ADDED_LATER
from btm_cluster.evaluation.rows import (
    BEST_EXPERT,
    BEST_MILESTONE,
    CALIBRATED_ENSEMBLE,
    OWN_EXPERT,
    POSTERIOR_AVERAGE,
    SEED,
    SEEDED_GATE,
    TRANSFORMER_LM,
    UNIFORM_AVERAGE,
    Milestones,
    Row,
    mixture_of_experts,
    top_k_ensemble,
)
from btm_cluster.evaluation.verdict import SplitResult, Verdict, verdict
from btm_cluster.terminal.tables import consoles
from btm_cluster.terminal.verdict import show_verdict

DOCUMENTS = 200


def split_result(text: str, is_target: bool, factors: dict[str, float], split: str = "test") -> SplitResult:
    """A text whose documents all have other difficulties; a system's
    log-probabilities are a factor times the common ones."""
    rng = np.random.default_rng(sum(map(ord, text)))
    tokens_D = torch.from_numpy(rng.integers(10, 100, DOCUMENTS)).double()
    logp_D = -tokens_D * torch.from_numpy(rng.uniform(2, 5, DOCUMENTS))
    # A tenth of it is said of end-of-text tokens, and a token has four bytes.
    logp_UD, sizes_UD = torch.stack([logp_D, 0.9 * logp_D]), torch.stack([tokens_D, 4 * tokens_D])
    logp = {name: factor * logp_UD for name, factor in factors.items()}
    return SplitResult(text, is_target, split, logp, sizes_UD)


def texts_with(factors: dict[str, float]) -> list[SplitResult]:
    return [
        split_result("law", False, factors),
        split_result("code", False, factors),
        split_result("mail", True, factors),
    ]


def row_of(found: Verdict, system: str) -> Row:
    return next(row for row in found.rows["test"] if row.system == system)


def test_identical_systems_differ_by_exactly_zero_and_cannot_be_told_apart() -> None:
    found = verdict(texts_with({SEED: 1.2, TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 1.0}))
    row = row_of(found, CALIBRATED_ENSEMBLE)
    for cell in (*row.cells.values(), *row.means.values()):
        assert cell.difference == 0.0
        assert cell.difference_interval == (0.0, 0.0)
    assert found.judgements[0].outcome == "undecided"
    assert found.sentence.startswith("Undecided as an ensemble: +0.0% perplexity")


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        (CALIBRATED_ENSEMBLE, "an ensemble"),
        (SEEDED_GATE, "an ensemble"),
        (top_k_ensemble(2), "an ensemble"),
        (POSTERIOR_AVERAGE, "a single model"),
        (BEST_EXPERT, "a single model"),
    ],
)
@pytest.mark.parametrize(("factor", "outcome"), [(0.9, "Worth it"), (1.1, "Not worth it")])
def test_a_system_that_is_better_on_every_document_is_worth_it_and_a_worse_one_is_not(
    factor: float, outcome: str, system: str, kind: str
) -> None:
    found = verdict(texts_with({TRANSFORMER_LM: 1.0, SEED: 1.3, system: factor}), costs={system: 3})
    assert found.baseline == TRANSFORMER_LM
    (judged,) = found.judgements
    difference = row_of(found, system).means["all"].difference
    assert found.sentence.startswith(f"{outcome} as {kind}: {difference:+.1%} perplexity (95 % interval ")
    shown = system if kind == "an ensemble" else f"{system}, another for each text"
    assert (
        f" against the Transformer-LM on 3 test texts, at 3 times its inference cost ({shown})."
        in found.sentence
    )
    assert judged.no_better_on == (() if factor < 1 else ("law", "code", "mail"))


@pytest.mark.parametrize(("cost", "told"), [(1.0012, "at its"), (1.69, "at 1.69 times its"), (1, "at its")])
def test_a_cost_that_is_rounded_to_one_is_told_as_one(cost: float, told: str) -> None:
    system = mixture_of_experts(1)
    found = verdict(texts_with({TRANSFORMER_LM: 1.0, system: 0.9}), costs={system: cost})
    assert f"3 test texts, {told} inference cost ({system})" in found.sentence


def test_the_judgement_names_the_texts_where_the_ensemble_was_no_better() -> None:
    results = [
        split_result("law", False, {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.7}),
        split_result("mail", True, {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 1.01}),
    ]
    assert verdict(results).sentence.endswith(" No better on: mail.")


def test_the_best_of_a_kind_is_chosen_on_development_text_and_judged_on_test_text() -> None:
    test = {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.9, SEEDED_GATE: 0.95, UNIFORM_AVERAGE: 1.2}
    development = {**test, CALIBRATED_ENSEMBLE: 0.95, SEEDED_GATE: 0.9}
    results = [
        split_result("law", False, of, split) for split, of in (("test", test), ("development", development))
    ]
    ensemble, single = verdict(results).judgements
    assert (ensemble.system, single.system) == (SEEDED_GATE, UNIFORM_AVERAGE)
    assert ensemble.difference == row_of(verdict(results), SEEDED_GATE).means["all"].difference
    assert (ensemble.outcome, single.outcome) == ("worth it", "not worth it")
    (without, _) = verdict(results[:1]).judgements
    assert without.system == CALIBRATED_ENSEMBLE, "by test text, where there is no other"


def test_bits_per_byte_are_those_of_the_formula_without_ends_of_texts() -> None:
    results = texts_with({SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9})
    found = row_of(verdict(results), CALIBRATED_ENSEMBLE)
    nats = {r.text: -float(r.logp[CALIBRATED_ENSEMBLE][0].sum() / r.sizes_UD[0].sum()) for r in results}
    expected = {text: 0.9 * one / 4 / math.log(2) for text, one in nats.items()}
    assert {text: cell.bits_per_byte for text, cell in found.cells.items()} == pytest.approx(expected)
    assert found.means["all"].bits_per_byte == pytest.approx(sum(expected.values()) / 3)
    told = verdict(results).to_json()["splits"]["test"][-1]
    assert told["texts"]["law"]["bits_per_byte"] == found.cells["law"].bits_per_byte


def test_perplexities_and_their_means_over_texts_are_those_of_the_formula() -> None:
    results = texts_with({TRANSFORMER_LM: 1.0, SEED: 1.1, CALIBRATED_ENSEMBLE: 0.9})
    found = row_of(verdict(results), CALIBRATED_ENSEMBLE)
    expected = {
        r.text: math.exp(-0.9 * float(r.logp[TRANSFORMER_LM][0].sum() / r.sizes_UD[0].sum())) for r in results
    }
    assert {text: cell.perplexity for text, cell in found.cells.items()} == pytest.approx(expected)
    assert found.means["domains"].perplexity == pytest.approx((expected["law"] + expected["code"]) / 2)
    assert found.means["targets"].perplexity == pytest.approx(expected["mail"])
    assert found.means["all"].perplexity == pytest.approx(sum(expected.values()) / 3)


def test_differences_are_ratios_of_means_and_lie_in_their_intervals() -> None:
    found = verdict(texts_with({TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.95}))
    row, baseline = row_of(found, CALIBRATED_ENSEMBLE), row_of(found, TRANSFORMER_LM)
    for group, cell in row.means.items():
        assert cell.difference == pytest.approx(cell.perplexity / baseline.means[group].perplexity - 1)
        low, high = cell.difference_interval
        assert low < cell.difference < high
        assert cell.interval[0] < cell.perplexity < cell.interval[1]


def test_without_a_transformer_lm_the_seed_is_the_baseline_and_is_not_held_against_itself() -> None:
    found = verdict(texts_with({SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9}))
    assert found.baseline == SEED
    assert row_of(found, SEED).means["all"].difference is None
    assert row_of(found, CALIBRATED_ENSEMBLE).means["all"].difference is not None


def test_the_forest_is_judged_against_the_best_milestone_whatever_test_text_says_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # By test text the finished one is better: which one the rival is was settled on development text.
    factors = {TRANSFORMER_LM: 0.95, BEST_MILESTONE: 1.0, CALIBRATED_ENSEMBLE: 0.97}
    milestones = Milestones({900: 9.5, 1000: 9.1, 1100: 9.2, 1200: 9.3}, best=1000)
    found = verdict(texts_with(factors), milestones=milestones)
    assert found.baseline == BEST_MILESTONE
    assert "Worth it as an ensemble: " in found.sentence
    assert (
        "against the Transformer-LM at its best milestone on 3 test texts (ensemble, calibrated)."
        in found.sentence
    )
    assert found.sentence.endswith(
        "That Transformer-LM is the one at update 1,000: of updates 900, 1,000, 1,100 and 1,200 it has the "
        "lowest "
        "perplexity on the founding domains' development text."
    )
    assert row_of(found, BEST_MILESTONE).means["all"].difference is None
    finished = row_of(found, TRANSFORMER_LM).means["all"].difference
    assert finished is not None
    assert finished < 0
    told = found.to_json()
    assert told["milestones"]["best"] == 1000
    assert told["milestones"]["development"]["1100"] == 9.2
    show_verdict(found, consoles(json_output=False)[0])
    assert "Transformer-LM at its best milestone" in capsys.readouterr().out


def test_where_the_finished_transformer_lm_is_the_best_the_sentence_says_so() -> None:
    found = verdict(
        texts_with({TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.9}),
        milestones=Milestones({6: 3.0, 9: 2.0}, best=9),
    )
    assert found.baseline == TRANSFORMER_LM
    assert "That Transformer-LM is the finished one: of updates 6 and 9 it has the lowest" in found.sentence
    unknown = verdict(texts_with({TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.9}))
    assert "That Transformer-LM" not in unknown.sentence
    assert unknown.to_json()["milestones"] is None


def test_a_baseline_whose_loss_rose_is_told_with_the_judgement() -> None:
    factors = {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.5}
    found = verdict(texts_with(factors), rise=Rise(lowest=4.18, at=1_484, last=4.85))
    assert found.judgements[0].outcome == "worth it"
    assert found.sentence.endswith(
        "The comparison may flatter the forest: the Transformer-LM's training loss rose from 4.18 around update 1,484 "
        "to 4.85 at the end. Lower its learning rate."
    )


def test_a_system_that_some_texts_lack_has_means_only_where_it_has_them_all() -> None:
    results = [
        split_result("law", False, {SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9, OWN_EXPERT: 0.8}),
        split_result("mail", True, {SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9}),
    ]
    row = row_of(verdict(results), OWN_EXPERT)
    assert set(row.cells) == {"law"}
    assert set(row.means) == {"domains"}


def test_documents_of_different_texts_are_drawn_independently() -> None:
    # The same documents under two names: were they drawn alike, the mean's interval would be as wide as each
    # text's own.
    one, other = (
        split_result("law", False, {SEED: 1.0, CALIBRATED_ENSEMBLE: 1.0}),
        split_result("law", False, {SEED: 1.0, CALIBRATED_ENSEMBLE: 1.0}),
    )
    renamed = SplitResult("twin", False, "test", other.logp, other.sizes_UD)
    row = row_of(verdict([one, renamed]), SEED)
    width = {
        name: cell.interval[1] - cell.interval[0]
        for name, cell in {**row.cells, "mean": row.means["all"]}.items()
    }
    assert width["mean"] == pytest.approx(width["law"] / math.sqrt(2), rel=0.15)


def test_splits_have_tables_of_their_own_and_the_sentence_speaks_of_test_text() -> None:
    factors = {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 1.1}
    better_in_development = split_result(
        "law", False, factors | {CALIBRATED_ENSEMBLE: 0.5}, split="development"
    )
    found = verdict([better_in_development, split_result("law", False, factors)])
    assert set(found.rows) == {"development", "test"}
    assert found.sentence.startswith("Not worth it")


def test_the_same_results_give_the_same_verdict_as_plain_json() -> None:
    results = texts_with({TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 0.9})
    first, second = (json.dumps(verdict(results).to_json(), allow_nan=False) for _ in range(2))
    assert first == second
    assert json.loads(first)["baseline"] == TRANSFORMER_LM


def test_a_text_that_one_side_alone_learned_from_is_shown_and_not_compared_on() -> None:
    # Against the Transformer-LM on all texts it would be a win; on what both could know it is a loss.
    both = [
        split_result(text, text == "mail", {TRANSFORMER_LM: 1.0, CALIBRATED_ENSEMBLE: 1.02})
        for text in ("law", "mail")
    ]
    added = split_result("tea", False, {TRANSFORMER_LM: 1.5, CALIBRATED_ENSEMBLE: 0.5})
    found = verdict([*both, added], {"tea": ADDED_LATER, "harbour": "no expert"})
    assert found.sentence.startswith("Not worth it as an ensemble: ")
    assert (
        "against the Transformer-LM on 2 test texts (ensemble, calibrated). No better on: law, mail."
        in found.sentence
    )
    assert (
        "learned from it: tea (added later); harbour (no expert). The Transformer-LM never saw tea."
        in found.sentence
    )
    assert "On targets the forest has more training than the Transformer-LM" in found.sentence
    row, alone = row_of(found, CALIBRATED_ENSEMBLE), row_of(verdict(both), CALIBRATED_ENSEMBLE)
    assert {group: row.means[group] for group in alone.means} == alone.means
    assert (row.cells["tea"].difference, row.means["left_out"].difference) == (None, None)
    assert row.means["left_out"].perplexity == row.cells["tea"].perplexity
    assert found.to_json()["left_out"] == {"tea": "added later", "harbour": "no expert"}


@pytest.mark.parametrize("split", ["test", "development"])
def test_where_nothing_is_left_to_compare_on_the_sentence_says_so(split: str) -> None:
    only = split_result("tea", False, {SEED: 1.5, CALIBRATED_ENSEMBLE: 0.5}, split)
    found = verdict([only], {"tea": ADDED_LATER} if split == "test" else {})
    assert found.sentence.startswith(
        "The forest is not compared with the seed: there is no test text to compare them on."
    )


def test_an_interval_of_the_domains_alone_is_not_shown_as_one_of_all_texts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = [
        split_result("law", False, {SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9, OWN_EXPERT: 0.8}),
        split_result("mail", True, {SEED: 1.0, CALIBRATED_ENSEMBLE: 0.9}),
    ]
    show_verdict(verdict(results), consoles(json_output=False)[0])
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(OWN_EXPERT))
    assert shown.count("on domains") == 2
