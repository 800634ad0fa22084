"""MLflow: a run of a plan is a run there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_cluster.plan import Plan


class Mlflow:
    """A run in MLflow; a training's curves begin with its name."""

    def __init__(self, plan: Plan) -> None:
        import mlflow

        asked = plan.tracking.mlflow
        assert asked is not None
        self._client = mlflow.MlflowClient(tracking_uri=asked.uri)
        found = self._client.get_experiment_by_name(asked.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(asked.experiment)
        self._run = self._client.create_run(experiment, run_name=plan.name).info.run_id
        for name, value in {"store": plan.store, **plan.training.model_dump(mode="json")}.items():
            self._client.log_param(self._run, name, value)

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, f"{label}/{name}", value, step=update, synchronous=False)

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None) -> None:
        """The verdict as a table, in the form of MLflow's own `log_table`, which needs pandas; the report as a
        file."""
        columns = list(verdict[0]) if verdict else []
        table = {"columns": columns, "data": [[row[name] for name in columns] for row in verdict]}
        self._client.log_dict(self._run, table, "verdict.json")
        if report is not None:
            self._client.log_artifact(self._run, str(report))

    def close(self, ended_well: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if ended_well else "FAILED")
