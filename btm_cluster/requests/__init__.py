"""What the driver asks of the workers: a record per step, of a few kB. Weights, tokens and scores go through the store."""

from typing import TypeAlias

from btm_cluster.requests.models import (
    AverageRequest,
    DemixPart,
    Pretrained,
    Resources,
    Role,
    SoupRequest,
    Start,
    TrainingText,
    TrainRequest,
    way_of,
)
from btm_cluster.requests.scores import FitForAll, MixRequest, MixText, ScoredSplit, ScoreRequest, TuneGate, Way
from btm_cluster.requests.texts import (
    FindOverlap,
    ImportTokenizer,
    PrepareRequest,
    ReadText,
    ShuffleTexts,
    Tokenize,
    TrainTokenizer,
)

Request: TypeAlias = PrepareRequest | TrainRequest | ScoreRequest | MixRequest | AverageRequest | SoupRequest

__all__ = [
    "AverageRequest",
    "DemixPart",
    "FindOverlap",
    "FitForAll",
    "ImportTokenizer",
    "MixRequest",
    "MixText",
    "PrepareRequest",
    "Pretrained",
    "ReadText",
    "Request",
    "Resources",
    "Role",
    "ScoreRequest",
    "ScoredSplit",
    "ShuffleTexts",
    "SoupRequest",
    "Start",
    "Tokenize",
    "TrainRequest",
    "TrainTokenizer",
    "TrainingText",
    "TuneGate",
    "Way",
    "way_of",
]
