"""What the user writes: one YAML file, read into frozen values. `plan.py` has the fields, the others what they are made of."""

from btm_cluster.plan.expansion import ExpansionPlan, InboxPlan
from btm_cluster.plan.plan import (
    ClusterPlan,
    DatasetPlan,
    DomainPlan,
    MergingPlan,
    ModelPlan,
    Plan,
    Preset,
    ReadingPlan,
    SizePlan,
    StudyPlan,
    TextPlan,
    TrainedTokenizerPlan,
    TrainingPlan,
    plan_schema,
    read_plan,
)
from btm_cluster.plan.tracking import TrackingPlan

__all__ = [
    "ClusterPlan",
    "DatasetPlan",
    "DomainPlan",
    "ExpansionPlan",
    "InboxPlan",
    "MergingPlan",
    "ModelPlan",
    "Plan",
    "Preset",
    "ReadingPlan",
    "SizePlan",
    "StudyPlan",
    "TextPlan",
    "TrackingPlan",
    "TrainedTokenizerPlan",
    "TrainingPlan",
    "plan_schema",
    "read_plan",
]
