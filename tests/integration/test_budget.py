"""The plan's budget: what steps cost over all runs with a store, and the stop once it is spent."""

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from btm_cluster.driver.budget import Meter, MeteredWorkers, Spent, spent_in
from btm_cluster.driver.capacity import demand_of
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.recipes import score_request, seed_request
from btm_cluster.errors import BudgetError, PlanError, Stopped
from btm_cluster.language_model import training
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.operations.plan import preview
from btm_cluster.plan import Plan, read_plan
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.in_process import InProcess, LocalControl
from btm_cluster.workers.on_ray.supervision import WARMING_UP, waiting_message
from tests.integration.conftest import PreparedStore, copy_store

SECOND = 1 / 3600
"""In hours."""


def metered(plan: Plan, clock: Callable[[], float]) -> tuple[Driver, MeteredWorkers]:
    """A driver in this process, whose time is the clock's."""
    ledger, stop = Ledger.open(plan.store), threading.Event()
    meter = Meter(plan, ledger.storage, lambda _: None, stop, clock)
    workers = MeteredWorkers(InProcess(ledger, LocalControl(meter, stop)), meter, ledger)
    return Driver(ledger, workers), workers


def with_budget(plan: Plan, seconds: float) -> Plan:
    return plan.model_copy(update={"budget": plan.budget.model_copy(update={"cpu_hours": seconds * SECOND})})


def test_a_spent_budget_stops_at_a_checkpoint_and_once_raised_the_run_goes_on_to_the_same_model(
    prepared_store: PreparedStore,
    plan_with_blocks: Plan,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    seed, ledger = prepared_store.seed, prepared_store.driver.ledger
    plan = with_budget(prepared_store.prepared.plan, 3.5)
    with pytest.raises(BudgetError) as stopped:
        metered(plan, count().__next__)[0].require([seed])
    saved = ledger.latest_training(seed.ref.identity)
    assert saved is not None
    assert 0 < saved.recipe["update"] < seed.last_update
    assert f"it goes on, seed at update {saved.recipe['update']}" in stopped.value.remedy
    assert "raise budget.cpu_hours" in stopped.value.remedy
    assert stopped.value.exit_code == Stopped.exit_code == 130
    spent = spent_in(ledger.storage)
    assert 3.5 * SECOND <= spent.cpu_hours < 8 * SECOND
    assert spent.gpu_hours == 0

    (note,) = preview(plan, ledger).notes
    assert "of 0.0009722 is spent (budget.cpu_hours), and about" in note
    again, workers = metered(plan, count().__next__)
    with pytest.raises(BudgetError, match="spent"):
        workers.check_budget([demand_of(seed)])
    with pytest.raises(BudgetError, match="spent"):
        again.require([seed])
    assert spent_in(ledger.storage) == spent, "nothing was started"

    (trained,) = metered(with_budget(plan, 1000), count().__next__)[0].require([seed])
    elsewhere = copy_store(plan_with_blocks, tmp_path_factory.mktemp("undisturbed") / "store")
    (undisturbed,) = metered(elsewhere, count().__next__)[0].require([seed])
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert trained.blob(file) == undisturbed.blob(file)
    metered(plan, count().__next__)[0].require([seed])  # what is made costs nothing


def test_scores_of_one_process_cost_its_time_once(prepared_store: PreparedStore) -> None:
    driver, prepared = prepared_store.driver, prepared_store.prepared
    prepared_store.train_seed()
    asked = [
        score_request(prepared, seed_request(prepared).ref, text, split)
        for text in prepared.domains
        for split in ("development", "test")
    ]
    ticks = count()
    before = spent_in(driver.ledger.storage).cpu_hours
    assert all(isinstance(one, Artifact) for one in metered(prepared.plan, ticks.__next__)[0].obtain(asked))
    assert 0 < spent_in(driver.ledger.storage).cpu_hours - before < next(ticks) * SECOND


@pytest.fixture
def on_gpus(prepared_store: PreparedStore) -> TrainRequest:
    return replace(prepared_store.seed, how=Resources(2, 0.5, 1, 16, "bfloat16", compile=True))


def test_gpu_hours_and_money_count_shares_of_gpus_from_the_first_report_at_work(
    prepared_store: PreparedStore, on_gpus: TrainRequest
) -> None:
    plan = prepared_store.prepared.plan
    cluster = plan.cluster.model_copy(update={"price_per_gpu_hour": 3.0})
    budget = plan.budget.model_copy(update={"money": 3.0})
    plan = plan.model_copy(update={"cluster": cluster, "budget": budget})
    now, stop = [0.0], threading.Event()
    meter = Meter(plan, prepared_store.driver.ledger.storage, lambda _: None, stop, lambda: now[0])
    meter.expect([on_gpus])

    def report(phase: str, at_hours: float) -> None:
        now[0] = 3600 * at_hours
        meter(Progress(on_gpus.label, phase))

    for phase in (WARMING_UP, waiting_message("2 GPUs")):
        report(phase, 1)
        assert meter.spent == Spent()
    report("starting", 2)
    report("training", 2.75)
    assert meter.spent.gpu_hours == pytest.approx(0.75)
    assert not stop.is_set()
    report("training", 3.1)
    assert stop.is_set()
    assert meter.over == "money"
    meter.ended(on_gpus)
    report("training", 9)
    assert meter.spent.gpu_hours == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"budget": {"money": 5}, "cluster": {"gpus_per_expert": 1}}, "price_per_gpu_hour"),
        ({"budget": {"gpu_hours": 5}}, "give `cpu_hours` instead"),
        ({"budget": {"cpu_hours": 5}, "cluster": {"gpus_per_expert": 1, "seed_gpus": 1}}, "give `gpu_hours`"),
        ({"budget": {"gpu_hours": 0}}, "budget.gpu_hours"),
    ],
    ids=str,
)
def test_a_budget_that_bounds_nothing_is_refused(
    change: dict[str, object], refused: str, fields: dict[str, object]
) -> None:
    with pytest.raises(PlanError, match=refused):
        read_plan(fields | change)
