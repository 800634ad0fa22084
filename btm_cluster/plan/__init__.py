"""The plan: one YAML file that the user writes, read into frozen values.

`plan.py` has the fields, the others what they are made of.
"""

from btm_cluster.plan.budget import BudgetPlan
from btm_cluster.plan.chat_template import ChatTemplate
from btm_cluster.plan.expansion import ExpansionPlan, InboxPlan
from btm_cluster.plan.plan import ClusterPlan, MergingPlan, MixtureOfExpertsPlan, Plan, plan_schema, read_plan
from btm_cluster.plan.search import SearchPlan
from btm_cluster.plan.study import GrowthPlan, SizePlan, StudyPlan
from btm_cluster.plan.texts import DatasetPlan, DomainPlan, ReadingPlan, TextPlan
from btm_cluster.plan.tracking import TrackingPlan
from btm_cluster.plan.training import (
    BranchingPlan,
    LoraPlan,
    ModelPlan,
    Preset,
    TrainedTokenizerPlan,
    TrainingPlan,
)
from btm_cluster.plan.trains import ALL, Lora, Part, Trains

__all__ = [
    "ALL",
    "BranchingPlan",
    "BudgetPlan",
    "ChatTemplate",
    "ClusterPlan",
    "DatasetPlan",
    "DomainPlan",
    "ExpansionPlan",
    "GrowthPlan",
    "InboxPlan",
    "Lora",
    "LoraPlan",
    "MergingPlan",
    "MixtureOfExpertsPlan",
    "ModelPlan",
    "Part",
    "Plan",
    "Preset",
    "ReadingPlan",
    "SearchPlan",
    "SizePlan",
    "StudyPlan",
    "TextPlan",
    "TrackingPlan",
    "TrainedTokenizerPlan",
    "TrainingPlan",
    "Trains",
    "plan_schema",
    "read_plan",
]
