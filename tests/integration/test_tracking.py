"""Curves of a real run: TensorBoard's in the store, always; Weights & Biases'
and MLflow's where the plan asks."""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from btm_cluster.algorithm import grow
from btm_cluster.cli import app, run_command
from btm_cluster.driver.preparation import read, tokenize
from btm_cluster.errors import StepError, Stopped, StoreError
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.curves import read_curve
from btm_cluster.ledger.timelines import Timeline, list_runs, read_timeline
from btm_cluster.plan import Plan
from btm_cluster.requests.progress import Progress
from btm_cluster.session import driving, opened_view
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.tracking.tracking import Tracking


@pytest.fixture(autouse=True)
def _every_update_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("btm_cluster.language_model.training.REPORT_SECONDS", 0.0)


VERDICT = [{"system": "seed", "perplexity": 12.5, "difference": None}]


def grow_in_process(plan: Plan) -> None:
    with opened_view() as view, driving(view, plan, None, in_process=True) as driver:
        grow(plan, driver)
        report = Path(plan.store, "report.html")
        report.write_text("a report")
        driver.run_log.finish(VERDICT, report)


def points(file: Path) -> list[tuple[str, int, float]]:
    """The scalars of an event file: name, update, value.

    Each record: its length (8 bytes), a checksum (4), data, another (4).
    """
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_every_training_of_a_run_leaves_its_curves_in_the_store(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:1], "targets": []})
    grow_in_process(plan)
    (run,) = Path(plan.store, "logs").iterdir()
    files = {path.parent.name: path for path in run.rglob("events.*")}
    assert files.keys() == {"seed", "kitchen", run.name}
    assert (
        b"| system | perplexity | difference |\n| --- | --- | --- |\n| seed | 12.5 |  |"
        in files[run.name].read_bytes()
    )
    ledger = Ledger.open(plan.store)
    forest = ledger.log.newest()
    models = {one.domain: Ref("model", one.identity) for one in forest.experts}
    models["seed"] = Ref("model", forest.foundation.seed)
    for label, updates in {"seed": range(1, 7), "kitchen": range(7, 13)}.items():
        losses = [(update, value) for name, update, value in points(files[label]) if name == "loss"]
        assert [update for update, _ in losses] == list(updates)
        assert all(0 < value < 20 for _, value in losses)
        curve = read_curve(ledger, ledger.get(models[label]))
        for name in ("loss", "learning_rate", "gradient_norm", "tokens"):
            told = [(update, value) for tag, update, value in points(files[label]) if tag == name]
            stored = list(zip(curve.updates, getattr(curve, name), strict=True))
            assert told == [(update, pytest.approx(value, rel=1e-5)) for update, value in stored], name
        told = [(update, value) for tag, update, value in points(files[label]) if tag == "development_loss"]
        looks = zip(curve.development.updates, curve.development.loss, strict=True)
        assert told == [(update, pytest.approx(value, rel=1e-5)) for update, value in looks]
    grow_in_process(plan)
    assert len(list(Path(plan.store, "logs").iterdir())) == 1  # nothing was trained, so there is no curve


def timeline_of(plan: Plan) -> Timeline:
    ledger = Ledger.open(plan.store)
    return read_timeline(ledger, list_runs(ledger)[0])


def test_a_run_leaves_what_ran_when_and_where_beside_its_curves(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:1], "targets": []})
    before = time.time()
    grow_in_process(plan)
    seen = timeline_of(plan)
    assert list(Path(plan.store, "logs").iterdir()) == [
        Path(plan.store, "logs", list_runs(Ledger.open(plan.store))[0])
    ]
    assert (seen.outcome, seen.left_out, seen.gpu_seconds) == ("done", 0, 0)
    assert before <= seen.began <= seen.events[0].began <= seen.events[-1].ended <= seen.ended <= time.time()
    steps = [(one.kind, one.label, one.domain, one.role) for one in seen.events]
    assert steps[0] == ("read_text", "kitchen", "kitchen", None)
    assert steps[-2:] == [("train", "seed", None, "seed"), ("train", "kitchen", "kitchen", "expert")]
    assert {one.what for one in seen.events} == {"step"}
    assert {one.node for one in seen.events} == seen.nodes.keys() == {"here"}
    assert seen.cpu_seconds == pytest.approx(sum(one.seconds for one in seen.events))


def stop_before_tokenising(plan: Plan) -> None:
    with opened_view() as view, driving(view, plan, None, in_process=True, command="run") as driver:
        prepared = read(plan, driver)
        signal.raise_signal(signal.SIGTERM)
        tokenize(prepared, driver)


def test_a_run_that_is_stopped_and_one_that_fails_say_so_in_their_timelines(fields: dict[str, Any]) -> None:
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:1], "targets": []})
    with pytest.raises(Stopped):
        stop_before_tokenising(plan)
    seen = timeline_of(plan)
    assert (seen.command, seen.outcome) == ("run", "stopped")
    assert [one.what for one in seen.events][-1] == "stop"
    endless = plan.model_copy(update={"training": plan.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(StepError):
        grow_in_process(endless)
    seen = timeline_of(plan)
    assert seen.outcome == "failed"
    assert [(one.what, one.label) for one in seen.events if one.what != "step"] == [("failure", "seed")]
    assert "not finite" in (seen.events[-1].cause or "")


class NoRoomForLogs(LocalFolder):
    """A store that takes no curves."""

    def upload(self, key: str, path: Path, keep: bool = True) -> None:  # noqa: ARG002 - it takes neither
        raise StoreError(f"cannot upload {key}", found=str(path))


def test_a_run_that_is_stopped_while_the_driver_itself_computes_ends_at_once(plan: Plan) -> None:
    with opened_view() as view, driving(view, plan, None, in_process=True) as driver:
        driver.is_asking = True  # workers notice by themselves, and save
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped), opened_view() as view, driving(view, plan, None, in_process=True):
        signal.raise_signal(signal.SIGTERM)


def test_a_store_that_takes_no_curves_costs_a_warning(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Progress] = []
    with Tracking(plan, NoRoomForLogs(str(tmp_path)), seen.append) as tracking:
        tracking(Progress("seed", "training", 1, 2, loss=3.0, tokens_per_second=10.0))
    assert [progress.done for progress in seen] == [1]
    assert "curves were not stored" in caplog.text


@pytest.mark.parametrize(("service", "asked"), [("wandb", {"project": "p"}), ("mlflow", {"experiment": "e"})])
def test_a_service_whose_package_is_missing_is_refused_with_how_to_install_it(
    service: str,
    asked: dict[str, str],
    fields: dict[str, Any],
    write_plan: Callable[[dict[str, Any]], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, service, None)
    path = write_plan(fields | {"tracking": {service: asked}})
    assert run_command(lambda: app(["run", str(path), "--in-process"])) == 2
    package = {"wandb": "wandb", "mlflow": "mlflow-skinny"}[service]  # ours is on no index
    assert f"pip install {package} " in capsys.readouterr().err


def test_wandb_gets_the_curves(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    fields |= {"domains": fields["domains"][:1], "targets": [], "tracking": {"wandb": {"project": "forests"}}}
    grow_in_process(Plan.model_validate(fields))
    wandb.teardown()  # offline, its own process writes the file, and may be at it when the run is finished
    (kept,) = tmp_path.rglob("*.wandb")
    told = kept.read_bytes()
    for name in (b"kitchen/loss", b"kitchen/learning_rate", b"kitchen/development_loss"):
        assert name in told, name
    assert b"report.html" in told
    (table,) = tmp_path.rglob("verdict_*.table.json")
    assert json.loads(table.read_text())["data"] == [["seed", 12.5, None]]


def test_mlflow_gets_the_curves(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    asked = {"experiment": "forests", "uri": tmp_path.as_uri()}
    fields |= {"domains": fields["domains"][:1], "targets": [], "tracking": {"mlflow": asked}}
    grow_in_process(Plan.model_validate(fields))
    client = mlflow.MlflowClient(tracking_uri=asked["uri"])
    experiment = client.get_experiment_by_name("forests").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    for name in ("loss", "learning_rate", "gradient_norm", "tokens"):
        points = client.get_metric_history(run.info.run_id, f"kitchen/{name}")
        assert {point.step for point in points} == set(range(7, 13)), name
    looks = client.get_metric_history(run.info.run_id, "kitchen/development_loss")
    assert {point.step for point in looks} == {6, 12}
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert json.loads((folder / "verdict.json").read_text()) == {
        "columns": ["system", "perplexity", "difference"], "data": [["seed", 12.5, None]],
    }  # fmt: skip
    assert (folder / "report.html").read_text() == "a report"


def test_a_service_that_fails_is_given_up_and_training_goes_on(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails:
        def log(self, *_: object) -> None:
            raise OSError("its disk is full")

        def close(self, ended_well: bool) -> None:
            raise AssertionError(f"it was given up, {ended_well}")

    seen: list[Progress] = []
    with Tracking(plan, LocalFolder(str(tmp_path)), seen.append) as tracking:
        tracking._makers.append(Fails)
        for update in (1, 2):
            tracking(Progress("seed", "training", update, 2, loss=3.0, tokens_per_second=10.0))
    assert len(seen) == 2
    assert caplog.text.count("Fails is given up for this run: its disk is full") == 1
