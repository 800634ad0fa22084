"""A forest that a study grows step by step: that it grows as `btm expand` grows one, what it costs, and its table."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from btm_cluster.algorithm import starts_for
from btm_cluster.curve import Rise
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedPlan
from btm_cluster.errors import UserError
from btm_cluster.evaluation.comparison import Comparer, Comparison
from btm_cluster.evaluation.systems import TRANSFORMER_LM, Ensemble
from btm_cluster.forest import Expert, Forest
from btm_cluster.ledger import Ref
from btm_cluster.operations.study import results_of
from btm_cluster.plan import Plan, StudyPlan
from btm_cluster.report.markdown import markdown
from btm_cluster.report.study_growth import growth_sections
from btm_cluster.study import growth, run
from btm_cluster.study.comparison import Models
from btm_cluster.study.growth import Step, _Spent, _total, grow_steps
from btm_cluster.study.models import train_repeat
from btm_cluster.study.repeats import repeats_of
from btm_cluster.study.run import Study, run_study
from tests.conftest import DOMAINS, in_process
from tests.integration.conftest import copy_store

FOUNDING, ADDED = DOMAINS[:2], DOMAINS[2]
REMOVED = DOMAINS[0]


@dataclass(frozen=True)
class Grew:
    """A finished study of growth, to be read only."""

    plan: Plan
    driver: Driver
    study: Study

    def entry(self, step: int, system: str, posterior: str | None = "calibrated") -> dict[str, Any]:
        wanted = {"step": step, "system": system, "posterior": posterior}
        (found,) = [e for e in self.study.growth if all(e[name] == value for name, value in wanted.items())]
        return dict(found)

    def steps(self, driver: Driver) -> list[Step]:
        (repeat,) = repeats_of(self.plan, driver)
        models, _ = train_repeat(repeat, driver)
        assert self.plan.study is not None
        assert self.plan.study.growth is not None
        return list(grow_steps(repeat, self.plan.study.growth, models.ensembles[0], driver))


def growing(plan: Plan, **fields: Any) -> Plan:
    study = StudyPlan.model_validate({"systems": [], "growth": {"founders": 2, **fields}})
    return plan.model_copy(update={"study": study})


def transformer_lm_alone(prepared: PreparedPlan, models: Models, driver: Driver) -> Comparison:
    """Of everything else a study compares, which takes longer than all of this and is in `test_study.py`."""
    return Comparer(prepared, {TRANSFORMER_LM: models.transformer_lm}, (), ("test",)).compare(driver)


@pytest.fixture(scope="module")
def grew(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> Grew:
    plan = growing(
        copy_store(plan_with_blocks, tmp_path_factory.mktemp("growth") / "store"), remove=[REMOVED]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "compare", transformer_lm_alone)
        driver = in_process(plan)
        before, study = run_study(plan, driver)
    assert (before.entries, before.repeats_left) == (study.entries, 1), (
        "the comparison does not wait for the growth"
    )
    assert (before.growth, study.repeats_left) == ((), 0)
    return Grew(plan, driver, study)


def test_every_step_is_measured_on_all_texts_with_the_ways_to_start(grew: Grew) -> None:
    branches = {"posterior branch", "seed branch", "uniform branch"}
    found = [{e["system"] for e in grew.study.growth if e["step"] == step} for step in range(3)]
    assert found == [
        {"transformer-lm", "founding forest"},
        {"transformer-lm", "grown at once", *branches},
        {"transformer-lm", "grown at once", *branches},
    ]
    changes = {e["step"]: (e["change"], tuple(e["domains"])) for e in grew.study.growth}
    assert changes == {
        0: ("founded", FOUNDING),
        1: (f"added {ADDED}", DOMAINS),
        2: (f"removed {REMOVED}", DOMAINS[1:]),
    }
    for entry in grew.study.growth:
        values = entry["per_domain"]
        own = [values[name] for name in entry["domains"]]
        assert entry["known"] == pytest.approx(sum(own) / len(own), rel=1e-4)
        assert entry["all"] == pytest.approx(sum(values.values()) / 4, rel=1e-4)
        assert (entry["unknown"] is None) == (entry["step"] == 1)
        assert (entry["difference"] is None) == (entry["system"] == "transformer-lm")


def test_the_forest_grows_as_btm_expand_grows_one(grew: Grew) -> None:
    driver = in_process(grew.plan)
    founded, added, _ = grew.steps(driver)
    assert not driver.made["model"], "all of it is in the store"
    (repeat,) = repeats_of(grew.plan, driver)
    new = next(text for text in repeat.prepared.domains if text.name == ADDED)
    (founding,) = founded.forests
    assert founding.seed is not None
    founders = tuple(founder for founder in repeat.prepared.founders if founder[0] in FOUNDING)
    foundation = replace(repeat.prepared, founders=founders).foundation(founding.seed.identity)
    experts = tuple(Expert(name, ref.identity, "", "", ()) for name, ref in founding.models)
    forest = Forest(0, foundation, experts, {}, reason="founded")
    for grown in added.forests[:3]:
        start = grown.system.removesuffix(" branch")
        branching = repeat.prepared.plan.branching.model_copy(update={"start": start})
        by_expansion = starts_for(repeat.branching_by(branching).prepared, forest, [new], driver)
        expert = driver.ledger.get(dict(grown.models)[ADDED])
        assert expert.inputs["start"] == (by_expansion[0].model,), grown.system
        assert set(founding.models) < set(grown.models)


def test_a_forest_pays_for_what_is_new_and_the_transformer_lm_for_everything(grew: Grew) -> None:
    training = grew.plan.training
    of_domain = training.blocks_per_domain_update * training.block_tokens
    seed, expert = training.seed_updates * of_domain, (training.updates - training.seed_updates) * of_domain
    assert grew.entry(0, "founding forest")["tokens"] == 2 * seed + 2 * expert
    for start in ("posterior", "seed", "uniform"):
        assert grew.entry(1, f"{start} branch")["tokens"] == expert
        assert grew.entry(1, f"{start} branch")["tokens_so_far"] == 2 * seed + 3 * expert
        assert grew.entry(2, f"{start} branch")["tokens"] == 0, "to remove costs nothing"
    assert grew.entry(1, "grown at once")["tokens"] == 3 * (seed + expert)
    whole = training.updates * of_domain
    retrained = [grew.entry(step, "transformer-lm", None) for step in range(3)]
    assert [one["tokens"] for one in retrained] == [2 * whole, 3 * whole, 2 * whole]
    assert retrained[-1]["tokens_so_far"] == 7 * whole


def test_a_transformer_lm_that_is_there_is_not_charged_again(grew: Grew) -> None:
    # The domain added last is taken out: what is left is what a step before had.
    plan = growing(grew.plan, remove=[ADDED])
    founded, _, removed = replace(grew, plan=plan).steps(in_process(plan))
    assert removed.retrained == founded.retrained
    entry = {"system": "transformer-lm", "cost": {"training_tokens": 5, "gpu_seconds": 1.0}}
    assert _total(entry, _Spent(7, 2.0), is_retrained=True) == _Spent(7, 2.0)
    assert _total(entry, _Spent(7, 2.0), is_retrained=False) == _Spent(12, 3.0)


def test_the_forest_without_a_domain_is_that_of_the_other_experts(grew: Grew) -> None:
    *_, added, removed = grew.steps(in_process(grew.plan))

    def models(forest: Ensemble) -> dict[str, Ref]:
        return dict(forest.models)

    for before, after in zip(added.forests, removed.forests, strict=True):
        assert models(after) == {name: one for name, one in models(before).items() if name != REMOVED}


def test_the_page_has_a_table_of_growth(grew: Grew) -> None:
    (section,) = growth_sections(results_of(grew.plan, grew.study))
    page, entry = markdown(section), grew.entry(1, "posterior branch")
    known, everything = f"{entry['known']:.1f}", f"{entry['all']:.1f}"
    assert "Growth: model, random seed 0" in page
    assert f"| 3 domains, added {ADDED} | posterior branch, calibrated | {known} | – | " in page
    assert f" | {everything} | {entry['bits_per_byte']:.4f} | " in page
    assert "| 0.0 |" not in page, "GPU-seconds on CPUs"


def test_trainings_whose_loss_rose_are_told_of(grew: Grew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "compare", transformer_lm_alone)
    for module in (run, growth):
        monkeypatch.setattr(module, "read_rise", lambda *_: Rise(3.0, 7, 4.0))
    *_, study = run_study(grew.plan, in_process(grew.plan))
    experts = [f"{domain}-0.5-model-0" for domain in DOMAINS]
    assert [row["training"] for row in study.rises] == ["transformer-lm-model-0", *experts]
    assert [bool(row["rise"]) for row in study.growth] == [
        row["system"] == "transformer-lm" for row in study.growth
    ]
    (section,) = growth_sections(results_of(grew.plan, study))
    sentence = Rise(3.0, 7, 4.0).sentence
    for step in ("2 domains, founded", f"3 domains, added {ADDED}", f"2 domains, removed {REMOVED}"):
        assert f"of the step '{step}' is no fair baseline: its {sentence}." in markdown(section)
    assert not grew.study.rises


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"founders": 3}, "leaves no domain to add"),
        ({"remove": ["market"]}, "cannot spare"),
        ({"remove": list(FOUNDING)}, "cannot spare"),
    ],
)
def test_a_growth_of_no_step_or_of_strangers_is_refused_before_a_text_is_read(
    plan_with_blocks: Plan, fields: dict[str, Any], words: str
) -> None:
    plan = growing(plan_with_blocks, **fields)
    with pytest.raises(UserError, match=words):
        repeats_of(plan, in_process(plan))
