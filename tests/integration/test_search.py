"""A study's search for a recipe, with trials that a rule of the test's own stops: what is trained, and what a
search that was killed has kept. Ray Tune itself is in `tests/end_to_end/test_searching.py`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from btm_cluster.driver.driver import Driver
from btm_cluster.errors import StepError, Stopped, UserError
from btm_cluster.plan import ModelPlan, Plan, SearchPlan, SizePlan, StudyPlan, TrainingPlan
from btm_cluster.study.repeat import Repeat
from btm_cluster.study.repeats import repeats_of
from btm_cluster.study.search import _Trial, check_search
from tests.conftest import in_process
from tests.integration.conftest import copy_store

SPACE = {"learning_rate": {"grid": [1e-4, 1e-2, 1e30]}, "first_rung": 0.25, "reduction_factor": 2}
STOPPED = 1
"""The trial that the rule stops at its second rung."""


@dataclass
class Rule:
    """Trials of a grid of learning rates: all at once, one of them stopped at the second rung."""

    space: SearchPlan
    killed_after: int | None = None
    """Results after which the driver is killed."""
    told: list[tuple[int, float, float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.space.learning_rate is not None
        rates = self.space.learning_rate.grid or ()
        self.trials = {number: {"learning_rate": rate} for number, rate in enumerate(rates, 1)}

    def under_way(self) -> Mapping[int, Mapping[str, float]]:
        return dict(self.trials)

    def tell(self, trial: int, share: float, perplexity: float | None) -> None:
        if self.killed_after == len(self.told):
            raise Stopped("killed")
        self.told.append((trial, share, perplexity))
        if perplexity is None or share == 1 or (trial == STOPPED and share >= 0.5):
            del self.trials[trial]


def searching(plan: Plan, killed_after: int | None = None) -> tuple[Driver, list[Rule]]:
    """A driver in this process, and the searches that it opens."""
    rules: list[Rule] = []

    @contextmanager
    def open_rule(space: SearchPlan) -> Iterator[Rule]:
        rules.append(Rule(space, killed_after))
        yield rules[-1]

    driver = in_process(plan)
    return Driver(driver.ledger, driver.workers, open_search=open_rule), rules


def with_search(plan: Plan, store: Path, **changed: object) -> Plan:
    return with_study(copy_store(plan, store), search=SPACE | changed)


def with_study(plan: Plan, **fields: object) -> Plan:
    return plan.model_copy(update={"study": StudyPlan.model_validate({"systems": [], **fields})})


@dataclass(frozen=True)
class Searched:
    """A finished search, to be read only."""

    driver: Driver
    rule: Rule
    repeat: Repeat


@pytest.fixture(scope="module")
def searched(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    plan = with_search(plan_with_blocks, tmp_path_factory.mktemp("searched") / "store")
    driver, rules = searching(plan)
    (repeat,) = repeats_of(plan, driver)
    return Searched(driver, rules[0], repeat)


def test_a_search_trains_to_each_rung_once_and_chooses_among_those_that_reach_the_end(
    searched: Searched,
) -> None:
    trials, told = searched.repeat.trials, searched.rule.told
    assert [row.get("share") for row in trials] == [0.5, None, 0.25]
    assert [row["chosen"] for row in trials] == [False, True, False]
    assert trials[2]["development"] is None, "it diverged at its first rung"
    assert [share for trial, share, _ in told if trial == 2] == [0.25, 0.5, 1.0]
    seconds = [trial for trial, share, _ in told if share == 0.5]
    assert seconds == [trial for trial, share, _ in told if share == 0.25 and trial != 3], "in one order"
    made = searched.driver.made["model"]
    assert made == 3 + 2, "three rungs of one trial, and two of the one that was stopped"


def test_a_rung_keeps_what_lies_at_its_update_and_the_role_of_what_it_is(searched: Searched) -> None:
    trial = _Trial(searched.repeat, "trial")
    two_thirds = trial.to_next_rung((2 / 3, 1.0))
    assert (two_thirds.last_update, two_thirds.snapshots) == (8, (8,)), (
        "or the first 8 updates are trained again"
    )
    assert two_thirds.role == "transformer-lm", "no seed of a forest"
    assert trial.to_next_rung((0.5, 1.0)).ref == searched.repeat.seeds[0.5].ref
    assert trial.to_next_rung((0.5, 1.0)).role == "seed"


def test_rungs_of_a_pretrained_model_are_counted_from_where_its_training_begins() -> None:
    training = TrainingPlan(updates=12, seed_share=0.75)
    model = ModelPlan(pretrained="folder")
    size = SizePlan.model_construct(name="model", model=model, training=training)
    with pytest.raises(UserError, match="updates 9, 10, 12"):
        check_search(size, SearchPlan.model_validate(SPACE | {"first_rung": 0.16, "reduction_factor": 3}))


def test_the_recipe_of_a_search_gives_the_models_of_a_plain_list_to_the_last_bit(
    searched: Searched, plan_with_blocks: Plan, tmp_path: Path
) -> None:
    plan = with_study(copy_store(plan_with_blocks, tmp_path / "store"), trials=[{"learning_rate": 1e-2}])
    driver = in_process(plan)
    (listed,) = repeats_of(plan, driver)
    whole = listed.transformer_lm()
    assert whole == searched.repeat.transformer_lm()
    for request in (whole, *listed.seeds.values(), *whole.at_snapshots):
        ours, theirs = (one.ledger.get(request.ref) for one in (searched.driver, driver))
        weights = [
            [blob.sha256 for blob in one.blobs if blob.name.endswith(".safetensors")]
            for one in (ours, theirs)
        ]
        assert weights[0] == weights[1] != []


def test_a_search_that_was_killed_goes_on_where_it_was(
    searched: Searched, plan_with_blocks: Plan, tmp_path: Path
) -> None:
    plan = with_search(plan_with_blocks, tmp_path / "store")
    killed, _ = searching(plan, killed_after=3)
    with pytest.raises(Stopped):
        repeats_of(plan, killed)
    again, rules = searching(plan)
    assert repeats_of(plan, again)[0].trials == searched.repeat.trials
    assert rules[0].told == searched.rule.told
    assert again.reused["model"] == killed.made["model"] > 0
    assert again.made["model"] + killed.made["model"] == searched.driver.made["model"]


def test_a_search_of_which_nothing_converges_fails(plan_with_blocks: Plan, tmp_path: Path) -> None:
    plan = with_search(plan_with_blocks, tmp_path / "store", learning_rate={"grid": [1e30, 1e29]})
    with pytest.raises(StepError, match=r"2 step\(s\) failed"):
        repeats_of(plan, searching(plan)[0])


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"first_rung": 0.01}, "rungs of model are not updates"),
        ({"first_rung": 0.97}, "rungs of model are not updates"),
        ({"blocks_per_domain_update": {"grid": [5]}}, "cost other compute"),
    ],
)
def test_a_search_at_odds_with_the_recipe_is_refused_before_a_text_is_read(
    plan_with_blocks: Plan, space: dict[str, object], words: str
) -> None:
    plan = with_study(plan_with_blocks, search=SPACE | space)
    with pytest.raises(UserError, match=words):
        repeats_of(plan, searching(plan)[0])


def test_without_ray_a_search_is_refused_with_the_way_out(plan_with_blocks: Plan) -> None:
    plan = with_study(plan_with_blocks, search=SPACE)
    with pytest.raises(UserError, match=r"study\.trials"):
        repeats_of(plan, in_process(plan))
