"""Requests of the driver to the workers: a record per step, of a few kB.

Weights, tokens and scores go through the store.
"""

from btm_cluster.requests.averages import (
    AverageRequest,
    FittedWeights,
    MergeRequest,
    MixtureOfExpertsRequest,
    SoupRequest,
    TaskVectorMethod,
    TaskVectorRequest,
)
from btm_cluster.requests.models import (
    PROFILE,
    DemixPart,
    Pretrained,
    Role,
    Start,
    TraceOf,
    TrainingText,
    TrainRequest,
)
from btm_cluster.requests.request import Resources, StepRequest
from btm_cluster.requests.scores import (
    FitForAll,
    FitText,
    MixingMethod,
    MixText,
    ScoredSplit,
    ScoreRequest,
)
from btm_cluster.requests.texts import (
    FindOverlap,
    ImportTokenizer,
    ReadText,
    ShuffleTexts,
    Tokenize,
    TrainTokenizer,
)

__all__ = [
    "PROFILE",
    "AverageRequest",
    "DemixPart",
    "FindOverlap",
    "FitForAll",
    "FitText",
    "FittedWeights",
    "ImportTokenizer",
    "MergeRequest",
    "MixText",
    "MixingMethod",
    "MixtureOfExpertsRequest",
    "Pretrained",
    "ReadText",
    "Resources",
    "Role",
    "ScoreRequest",
    "ScoredSplit",
    "ShuffleTexts",
    "SoupRequest",
    "Start",
    "StepRequest",
    "TaskVectorMethod",
    "TaskVectorRequest",
    "Tokenize",
    "TraceOf",
    "TrainRequest",
    "TrainTokenizer",
    "TrainingText",
]
