"""One model of a forest's experts, as `btm merge` and `btm export` make it: which weights or which method,
checked before anything starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from btm_cluster.algorithm import Grown
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.prepared_plan import PreparedText
from btm_cluster.equations.task_vectors import TASK_ARITHMETIC_SCALE, TIES_DENSITY, TIES_SCALE
from btm_cluster.errors import UserError
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import (
    SEARCHES,
    average_request,
    scores_for,
    uniform_request,
    weight_requests,
)
from btm_cluster.evaluation.systems import Ensemble, with_seed
from btm_cluster.forest import Forest
from btm_cluster.language_model.averaging import average_models
from btm_cluster.language_model.model import load_model
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.evaluate import TAKEN_OUT
from btm_cluster.requests import MergeRequest, TaskVectorMethod, TaskVectorRequest
from btm_cluster.steps.average import check_compatible
from btm_cluster.steps.stored import open_config, open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK_VECTORS: tuple[TaskVectorMethod, ...] = ("task-arithmetic", "ties")
SCALES: Mapping[TaskVectorMethod, float] = {"task-arithmetic": TASK_ARITHMETIC_SCALE, "ties": TIES_SCALE}
WITHOUT_TEXT = ("uniform", *TASK_VECTORS)
FOR_A_TEXT = ("argmax", "posterior", *SEARCHES)


@dataclass(frozen=True)
class Average:
    """How experts are made one model."""

    weights: str
    """One of WITHOUT_TEXT or FOR_A_TEXT."""
    target: str | None = None
    """The text that it is for, by name."""
    density: float | None = None
    scale: float | None = None

    @property
    def label(self) -> str:
        """The name that it is shown by."""
        return f"{self.weights} for {self.target}" if self.target else self.weights


def check_average(asked: Average, option: str, texts: Sequence[str], needs_target: bool = True) -> None:
    """Refuses what cannot be met, before anything starts. `texts` are those that an average may be for: none
    where there is no plan.

    Raises:
        UserError: saying what is wrong with it.
    """
    known = (*WITHOUT_TEXT, *(FOR_A_TEXT if texts else ()))
    if asked.weights not in known:
        remedy = "name a plan instead of --store" if asked.weights in FOR_A_TEXT else ""
        raise UserError(f"{option} is unknown", found=asked.weights, expected=", ".join(known), remedy=remedy)
    if asked.weights in WITHOUT_TEXT and asked.target is not None:
        raise UserError(
            f"{option} {asked.weights} is the same for every text",
            found=f"--for {asked.target}",
            remedy="leave out one of the two",
        )
    if asked.weights in FOR_A_TEXT and needs_target and not asked.target:
        raise UserError(
            f"{option} {asked.weights} needs a text to merge for",
            expected=f"--for TEXT, such as {', '.join(texts)}; btm merge also takes files of your own, --text FILE",
        )
    _check_parameters(asked, option)


def _check_parameters(asked: Average, option: str) -> None:
    if asked.density is not None and asked.weights != "ties":
        raise UserError(
            "--density is of one method alone", found=f"{option} {asked.weights}", expected=f"{option} ties"
        )
    if asked.scale is not None and asked.weights not in TASK_VECTORS:
        expected = " or ".join(f"{option} {name}" for name in TASK_VECTORS)
        raise UserError("--scale is of task vectors", found=f"{option} {asked.weights}", expected=expected)
    if asked.density is not None and not 0 < asked.density <= 1:
        raise UserError(
            "--density is no share", found=f"{asked.density:g}", expected="more than 0, at most 1"
        )
    if asked.scale is not None and not math.isfinite(asked.scale):
        raise UserError("--scale is no number", found=f"{asked.scale}", expected="a finite one")


def request_without_text(forest: Forest, asked: Average) -> MergeRequest:
    """The request for one of WITHOUT_TEXT: it hangs on the forest alone."""
    models = tuple(Ref("model", expert.identity) for expert in forest.experts)
    method = next((method for method in TASK_VECTORS if method == asked.weights), None)
    if method is None:
        return uniform_request(models)
    scale = SCALES[method] if asked.scale is None else asked.scale
    density = asked.density or (TIES_DENSITY if method == "ties" else 1.0)
    seed = Ref("model", forest.foundation.seed)
    return TaskVectorRequest(asked.weights, models, seed, method, scale, density)


def make_average(grown: Grown, asked: Average, driver: Driver) -> Artifact:
    """The model, made by the merge actor if that was not done.

    Raises:
        UserError: a text that was taken out of the forest, or has nothing to search weights on.
    """
    if asked.weights in WITHOUT_TEXT:
        return driver.require([request_without_text(grown.forest, asked)])[0]
    ensemble, name, text = _wanted(grown, asked)
    prepared = grown.prepared
    scores = scores_for(prepared, ensemble, text) if name != "greedy" else []
    steps = weight_requests(prepared, ensemble, name, text)
    return driver.require([*scores, *steps, average_request(prepared, ensemble, name, text)])[-1]


def _wanted(grown: Grown, asked: Average) -> tuple[Ensemble, str, PreparedText]:
    """The models to average, the name of their weights, and the text that these are for."""
    prepared = grown.prepared
    experts = forest_ensemble(prepared, grown.forest)
    text = next((text for text in prepared.texts if text.name == asked.target), None)
    if text is None:
        raise UserError(f"{asked.target!r} was taken out of the forest", remedy=TAKEN_OUT)
    if asked.weights in SEARCHES and not text.tokens["development"]:
        raise UserError(
            f"{asked.target!r} has no development text to search weights on",
            remedy="name `development` files for it in the plan, or say --weights uniform",
        )
    if asked.weights == "learned":
        return with_seed(experts), asked.weights, text
    is_prior = asked.weights == "posterior"
    return experts, prepared.plan.merging.average_prior if is_prior else asked.weights, text


def average_by_weights(
    ledger: Ledger, models: Mapping[str, Ref], weights: Mapping[str, float]
) -> "PreTrainedModel":
    """The average of stored models with weights that are given by name; nothing is stored.

    Raises:
        UserError: a name that no model has, or weights that do not sum to one.
        IncompatibleError: models of different origins, shapes or tokenizers.
    """
    _check_weights(weights, models)
    # In the order of identities, as the step has them: sums in float32 depend on it.
    used = sorted((models[name].identity, weight) for name, weight in weights.items() if weight)
    found = [ledger.get(Ref("model", identity)) for identity, _ in used]
    check_compatible(ledger, found)
    average = average_models([open_weights(ledger, one) for one in found], [w for _, w in used])
    return load_model(open_config(ledger, found[0]), average)


def _check_weights(weights: Mapping[str, float], models: Mapping[str, Ref]) -> None:
    unknown = sorted(weights.keys() - models.keys())
    if unknown:
        raise UserError(
            "weights of models that the forest has not",
            found=", ".join(unknown),
            expected=f"some of {', '.join(models)}",
        )
    total = math.fsum(weights.values())
    if not math.isclose(total, 1, abs_tol=1e-6):
        raise UserError("weights do not sum to one", found=f"{total:g}", remedy="divide them by their sum")
