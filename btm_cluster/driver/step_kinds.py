"""Kinds of steps as a run counts them, in the order in which it comes to them."""

from dataclasses import dataclass

from btm_cluster.requests import (
    AverageRequest,
    FindOverlap,
    FitForAll,
    FitText,
    ImportTokenizer,
    MixText,
    MixtureOfExpertsRequest,
    ReadText,
    ScoreRequest,
    ShuffleTexts,
    SoupRequest,
    StepRequest,
    TaskVectorRequest,
    Tokenize,
    TrainRequest,
    TrainTokenizer,
)


@dataclass(frozen=True)
class Kind:
    """Steps that are counted together."""

    done: str
    """After a count: `3/8 experts trained`."""
    order: int
    stage: int
    """Steps of one stage run side by side, and after those of lower ones."""
    passes_tokens: bool = False
    """Whether a model sees tokens."""
    is_in_bytes: bool = False


PREPARE, SEED, TRAIN, SCORE, COMBINE = range(5)
READ = Kind("texts read", 0, PREPARE, is_in_bytes=True)
SHUFFLED = Kind("random splits", 1, PREPARE)
TOKENIZER = Kind("tokenizer", 2, PREPARE)
TOKENISED = Kind("shards tokenised", 3, PREPARE)
SEEDS = Kind("seed trained", 4, SEED, passes_tokens=True)
EXPERTS = Kind("experts trained", 5, TRAIN, passes_tokens=True)
BASELINES = Kind("baselines trained", 6, TRAIN, passes_tokens=True)
SCORES = Kind("scores", 7, SCORE, passes_tokens=True)
FITS = Kind("fits", 8, COMBINE)
SEARCHES = Kind("searches", 9, COMBINE)
MIXTURES = Kind("mixtures", 10, COMBINE)
AVERAGES = Kind("averages", 11, COMBINE)
EXPERTS_MIXED = Kind("mixtures of experts", 12, COMBINE)
OVERLAPS = Kind("texts compared", 13, PREPARE)
OTHERS = Kind("other steps", 14, COMBINE)
"""Steps without a count of their own."""

_KINDS: dict[type[StepRequest], Kind] = {
    ReadText: READ,
    ShuffleTexts: SHUFFLED,
    TrainTokenizer: TOKENIZER,
    ImportTokenizer: TOKENIZER,
    Tokenize: TOKENISED,
    ScoreRequest: SCORES,
    FitForAll: FITS,
    FitText: FITS,
    SoupRequest: SEARCHES,
    MixText: MIXTURES,
    AverageRequest: AVERAGES,
    TaskVectorRequest: AVERAGES,
    MixtureOfExpertsRequest: EXPERTS_MIXED,
    FindOverlap: OVERLAPS,
}


def kind_of(request: StepRequest) -> Kind:
    """The kind of a step."""
    if isinstance(request, TrainRequest):
        return {"seed": SEEDS, "expert": EXPERTS}.get(request.role, BASELINES)
    return _KINDS.get(type(request), OTHERS)
