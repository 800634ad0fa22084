"""The part of a plan that says where curves go besides the store: services that whole teams look at."""

from btm_cluster.plan.section import Section
from btm_cluster.plan.values import Location, Text


class WandbPlan(Section):
    """Weights & Biases. Key and server come from its own environment variables or `wandb login`."""

    project: Text
    """The project that runs are shown in."""
    entity: Text | None = None
    """The team; without it, the default of the key's owner."""


class MlflowPlan(Section):
    """MLflow. Credentials come from its own environment variables."""

    experiment: Text
    """The experiment that runs are shown in."""
    uri: Location | None = None
    """The tracking server; without it, MLFLOW_TRACKING_URI."""


class TrackingPlan(Section):
    """Where curves go. TensorBoard's are always written, to `logs/` in the store."""

    wandb: WandbPlan | None = None
    """Weights & Biases, too; needs `pip install wandb` where the driver runs."""
    mlflow: MlflowPlan | None = None
    """MLflow, too; needs `pip install mlflow-skinny` where the driver runs."""
