"""The plan's budget: what steps cost over all runs with a store, and the stop once it is spent."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from btm_cluster.driver.budget import Budget, Spent, WorkersWithinBudget, spent_in
from btm_cluster.driver.capacity import demand_of
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.driver.run_log import RunLog
from btm_cluster.errors import BudgetError, PlanError, Stopped
from btm_cluster.language_model import training
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger.timelines import list_runs, read_timeline, write_timeline
from btm_cluster.operations.plan import preview
from btm_cluster.plan import Plan, read_plan
from btm_cluster.requests import StepRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.workers.in_process import InProcess, LocalControl
from btm_cluster.workers.step_events import event_of
from tests.integration.conftest import PreparedStore, copy_store

SECOND = 1 / 3600
"""In hours."""


@contextmanager
def within_budget(plan: Plan) -> Iterator[tuple[Driver, Budget]]:
    """A driver in this process, whose clock goes on by a second at each look."""
    ledger, stop = Ledger.open(plan.store), threading.Event()
    ticks = count(1_700_000_000)
    events = RunEvents("run", lambda: float(next(ticks)))
    budget = Budget(plan, ledger, events, lambda _: None, stop)
    workers = WorkersWithinBudget(InProcess(ledger, LocalControl(budget, stop), events), budget)
    with RunLog(ledger, events):
        yield Driver(ledger, workers), budget


def require(plan: Plan, request: StepRequest) -> Artifact:
    with within_budget(plan) as (driver, _):
        return driver.require([request])[0]


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
        require(plan, seed)
    saved = ledger.latest_training(seed.ref.identity)
    assert saved is not None
    assert 0 < saved.recipe["update"] < seed.last_update
    assert f"it goes on, seed at update {saved.recipe['update']}" in stopped.value.remedy
    assert "raise budget.cpu_hours" in stopped.value.remedy
    assert stopped.value.exit_code == Stopped.exit_code == 130
    spent = spent_in(ledger)
    assert 3.5 * SECOND <= spent.cpu_hours < 10 * SECOND
    assert spent.gpu_hours == 0
    (run,) = list_runs(ledger)
    timeline = read_timeline(ledger, run)
    assert timeline.outcome == "stopped"
    assert [event.cause for event in timeline.events if event.what == "stop"] == [
        "the plan's budget is spent"
    ]

    (note,) = preview(plan, ledger).notes
    assert "of 0.0009722 is spent (budget.cpu_hours), and about" in note
    with within_budget(plan) as (again, budget):
        with pytest.raises(BudgetError, match="spent"):
            budget.check([demand_of(seed)])
        with pytest.raises(BudgetError, match="spent"):
            again.require([seed])
    assert spent_in(ledger) == spent, "nothing was started"

    trained = require(with_budget(plan, 1000), seed)
    elsewhere = copy_store(plan_with_blocks, tmp_path_factory.mktemp("undisturbed") / "store")
    undisturbed = require(elsewhere, seed)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert trained.blob(file) == undisturbed.blob(file)
    require(plan, seed)  # what is made costs nothing


def test_gpu_hours_and_money_are_those_that_steps_hold(prepared_store: PreparedStore) -> None:
    plan = prepared_store.prepared.plan
    cluster = plan.cluster.model_copy(update={"price_per_gpu_hour": 3.0})
    budget = plan.budget.model_copy(update={"money": 3.0})
    plan = plan.model_copy(update={"cluster": cluster, "budget": budget})
    now, stop = [0.0], threading.Event()
    events = RunEvents("run", lambda: now[0])
    kept = Budget(plan, prepared_store.driver.ledger, events, lambda _: None, stop)
    step = event_of(prepared_store.seed, "step", 0.0, 0.0, gpus=0.5, cpus=2)
    events.begin("seed", step)

    def report(at_hours: float) -> None:
        now[0] = 3600 * at_hours
        kept(Progress("seed", "training"))

    report(1.5)
    assert kept.spent == Spent(gpu_hours=0.75, cpu_hours=3)
    assert not stop.is_set()
    report(2.1)
    assert stop.is_set()
    assert kept.limit == "money"
    assert "3.15 of 3 is spent (budget.money)" in kept.stopped([]).found


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"budget": {"money": 5}, "cluster": {"gpus_per_expert": 1}}, "price_per_gpu_hour"),
        ({"budget": {"gpu_hours": 5}}, "give `cpu_hours` instead"),
        ({"budget": {"gpu_hours": 0}}, "budget.gpu_hours"),
    ],
    ids=str,
)
def test_a_budget_that_bounds_nothing_is_refused(
    change: dict[str, object], refused: str, fields: dict[str, object]
) -> None:
    with pytest.raises(PlanError, match=refused):
        read_plan(fields | change)


def test_a_run_whose_timeline_cannot_be_read_is_not_counted_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger.open(str(tmp_path / "store"))
    for run in ("whole", "broken"):
        write_timeline(ledger, run, RunEvents("run").timeline().model_copy(update={"gpu_seconds": 7200.0}))
    (tmp_path / "store" / "logs" / "broken" / "timeline.json").write_text("{}")
    assert spent_in(ledger) == Spent(gpu_hours=2.0)
    assert "what the run broken has cost is not counted" in caplog.text
