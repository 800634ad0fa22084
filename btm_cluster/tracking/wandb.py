"""Weights & Biases: a run of a plan is a run there."""

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

    def close(self, ended_well: bool) -> None:
        self._run.finish(exit_code=0 if ended_well else 1)
