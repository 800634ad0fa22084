"""Weights & Biases: a run of a plan is a run there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_cluster.plan import Plan


class Wandb:
    """A run in Weights & Biases, with a group of curves for each training over its own updates."""

    def __init__(self, plan: Plan) -> None:
        import wandb

        asked = plan.tracking.wandb
        assert asked is not None
        config = plan.model_dump(mode="json")
        self._run = wandb.init(project=asked.project, entity=asked.entity, name=plan.name, config=config)
        self._known: set[str] = set()

    def log(self, label: str, update: int, values: dict[str, float]) -> None:
        if label not in self._known:
            self._known.add(label)
            self._run.define_metric(f"{label}/*", step_metric=f"{label}/update")
        named = {f"{label}/{name}": value for name, value in values.items()}
        self._run.log(named | {f"{label}/update": update})

    def finish(self, verdict: Sequence[Mapping[str, Any]], report: Path | None) -> None:
        """The verdict as a table, and the report as an artifact."""
        import wandb

        columns = list(verdict[0]) if verdict else []
        self._run.log({"verdict": wandb.Table(columns, [[row[name] for name in columns] for row in verdict])})
        if report is not None:
            artifact = wandb.Artifact(f"report-{self._run.id}", type="report")
            artifact.add_file(str(report))
            self._run.log_artifact(artifact)

    def close(self, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)
