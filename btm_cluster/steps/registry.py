"""Which function does what a request asks for, and where it runs. A new kind of step is one line here."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from btm_cluster.ledger import Artifact, Ledger
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
from btm_cluster.requests.progress import Control


@dataclass(frozen=True)
class Step:
    """A step function by module and name, imported where it runs: a process that
    only reads texts has no use for torch."""

    module: str
    function: str
    runs_in: Literal["task", "trainer", "merger"] = "task"
    """A task of its own, a named actor that trains, or the merge actor."""
    takes_batches: bool = False
    """Whether the function takes several requests of one batch and yields an artifact for each."""


STEPS: Mapping[type[StepRequest], Step] = {
    ReadText: Step("read", "read_text"),
    ShuffleTexts: Step("read", "shuffle_texts"),
    TrainTokenizer: Step("tokenizer", "train_tokenizer"),
    ImportTokenizer: Step("tokenizer", "import_tokenizer"),
    Tokenize: Step("tokenize", "tokenize"),
    FindOverlap: Step("overlap", "find_overlap"),
    TrainRequest: Step("train", "train", runs_in="trainer"),
    AverageRequest: Step("average", "average", runs_in="merger", takes_batches=True),
    TaskVectorRequest: Step("average", "merge_task_vectors", runs_in="merger"),
    MixtureOfExpertsRequest: Step("mixture_of_experts", "mix_experts"),
    SoupRequest: Step("soup", "search"),
    ScoreRequest: Step("score", "score", takes_batches=True),
    FitForAll: Step("fit", "fit_for_all"),
    FitText: Step("fit", "fit_text"),
    MixText: Step("mix", "mix"),
}


def run_batch(requests: Sequence[StepRequest], ledger: Ledger, control: Control) -> Iterator[Artifact]:
    """Does what the requests of one batch ask for: commits an artifact for each, and yields them in order."""
    kind = type(requests[0])
    function = function_of(kind)
    if STEPS[kind].takes_batches:
        yield from function(requests, ledger, control)
    else:
        yield from (function(request, ledger, control) for request in requests)


def function_of(kind: type[StepRequest]) -> Callable[..., Any]:
    """The function that does what requests of a kind ask for."""
    step = STEPS[kind]
    with quick_imports():
        function: Callable[..., Any] = getattr(
            import_module(f"btm_cluster.steps.{step.module}"), step.function
        )
    return function


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pauses Python's garbage collector, with which importing torch and transformers takes a quarter longer.

    Collections leave out what is there once torch is: to look through all of it took a second where a process ends.
    """
    was_enabled = gc.isenabled()
    is_first = "torch" not in sys.modules
    if is_first:
        gc.collect()  # or garbage of before would stay
    gc.disable()
    try:
        yield
    finally:
        if is_first and "torch" in sys.modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
