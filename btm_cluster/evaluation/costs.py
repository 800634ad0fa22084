"""The cost of each system of a comparison: what its training took, what a token takes, and what is stored.

Told from manifests alone: every model that was trained on the way to a system counts once, the seed included.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from btm_cluster.evaluation.comparison import Comparison, SystemModels
from btm_cluster.evaluation.systems import System
from btm_cluster.language_model.deltas import count_trained
from btm_cluster.language_model.tensor_files import holds_weights
from btm_cluster.language_model.utilisation import flops_per_token, inference_flops
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import ALL, Lora, Trains

MEASURED_SHARE = 0.5
"""Of a training's tokens, by the processes whose seconds are noted."""
EQUAL = 0.05
"""Costs that differ by no more count as equal: a router, or an adapter beside what it adapts."""


@dataclass(frozen=True)
class Cost:
    """The cost of a system."""

    training_tokens: int
    """Tokens of all models that were trained for it, with what they started from; of a pretrained model none are
    known."""
    training_flops: int
    """By parameters and attention, as for model FLOPs utilisation; frozen parameters have no gradient."""
    gpu_seconds: float | None
    """GPUs times seconds of these trainings, shares of a GPU as such. 0 on CPUs. None where seconds are noted of less
    than half of one of them: that rate is mostly the one of starting."""
    inference_flops: int
    """For each token, by the same count: the forward passes of all models that it runs."""
    stored_bytes: int
    """Weights that are stored to use it, with the bases of deltas."""
    bytes_of_each: int
    """Weights that are stored for one of the models trained for it, without its base: the mean."""
    tokens_per_second: float | None
    """The mean over the last trainings of these models. None where there is none, as for a pretrained one, or
    where seconds are noted of less than half of one of them."""


def costs_of(
    comparison: Comparison, model: Mapping[str, Any], block_tokens: int, ledger: Ledger
) -> dict[System, Cost]:
    """The cost of every system whose models are known. `model` is the configuration that all of them share but
    mixtures of experts."""
    every = {ref for models in comparison.models.values() for ref in (*models.trained, *models.used)}
    known = _Known(ledger, every)
    parameters, _ = count_trained(model, ALL)
    dense = inference_flops(model, parameters, block_tokens)

    def cost(system: System, models: SystemModels) -> Cost:
        used = [known.artifact(ref) for ref in models.used]
        active = used[0].facts.get("active_parameters")
        a_token = comparison.costs[system] * dense
        if active is not None:
            a_token = inference_flops(model, active, block_tokens)
        return known.cost(models, round(a_token))

    return {
        system: cost(system, models)
        for system, models in comparison.models.items()
        if system in comparison.rows
    }


def is_better(interval: Sequence[float], relative_cost: float) -> bool | None:
    """Whether a system is better than a baseline at equal cost, by the interval of its relative difference in
    perplexity and its cost over the baseline's.

    A better one that costs more leaves that open, and so does one that is not better and costs less: None.
    """
    if interval[1] < 0:
        return True if relative_cost <= 1 + EQUAL else None
    return False if relative_cost >= 1 - EQUAL else None


def gpu_seconds(model: Artifact) -> float | None:
    """GPU-seconds of a training, by its rate. None where that was measured on less than half of it."""
    rate = _measured_rate(model)
    return None if rate is None else float(model.facts["tokens"] / rate * model.note["gpus"])


def _measured_rate(model: Artifact) -> float | None:
    """Tokens per second of a training, where they were measured on half of it at least."""
    note = model.note
    measured = note["tokens_per_second"] * note["seconds"] >= model.facts["tokens"] * MEASURED_SHARE
    return float(note["tokens_per_second"]) if measured else None


class _Known:
    """Artifacts of models, each read once."""

    def __init__(self, ledger: Ledger, models: Iterable[Ref]) -> None:
        self._ledger = ledger
        self._artifacts = {one.ref: one for one in ledger.find_all(list(models)) if one is not None}

    def artifact(self, ref: Ref) -> Artifact:
        if ref not in self._artifacts:
            self._artifacts[ref] = self._ledger.get(ref)
        return self._artifacts[ref]

    def cost(self, models: SystemModels, inference_flops: int) -> Cost:
        roots = [self.artifact(ref) for ref in models.trained]
        trainings = [one for one in self._with_parents(roots) if one.facts.get("tokens")]
        speeds = [_measured_rate(one) for one in roots if one.facts.get("tokens")]
        seconds = [gpu_seconds(one) for one in trainings]
        return Cost(
            training_tokens=sum(one.facts["tokens"] for one in trainings),
            training_flops=sum(one.facts["tokens"] * _flops_per_token(one) for one in trainings),
            gpu_seconds=_rounded(sum, seconds),
            inference_flops=inference_flops,
            stored_bytes=sum(_stored_bytes(one) for one in self._with_bases(models.used)),
            bytes_of_each=round(sum(map(_stored_bytes, roots)) / len(roots)),
            tokens_per_second=_rounded(fmean, speeds) if speeds else None,
        )

    def _with_parents(self, roots: Iterable[Artifact]) -> list[Artifact]:
        """Models, and all that they were made from, each once."""
        found, left = dict[Ref, Artifact](), list(roots)
        while left:
            one = left.pop()
            if one.ref not in found:
                found[one.ref] = one
                left += [self.artifact(Ref("model", parent)) for parent in one.parents]
        return list(found.values())

    def _with_bases(self, refs: Iterable[Ref]) -> list[Artifact]:
        """Models, and the bases of those that hold only what changed, each once."""
        found, left = dict[Ref, Artifact](), list(refs)
        while left:
            one = self.artifact(left.pop())
            found[one.ref] = one
            left += one.inputs["start"] if one.is_delta else ()
        return list(found.values())


def _rounded(combine: Callable[[Sequence[float]], float], values: Sequence[float | None]) -> float | None:
    """The values combined to one, to a tenth; None where one was not measured."""
    measured = [value for value in values if value is not None]
    return round(combine(measured), 1) if len(measured) == len(values) else None


def _stored_bytes(model: Artifact) -> int:
    return sum(blob.size_bytes for blob in model.blobs if holds_weights(blob.name))


def _flops_per_token(model: Artifact) -> int:
    recipe = model.recipe
    trained, frozen = count_trained(recipe["model"], _trains(recipe))
    block_tokens = recipe["training"]["block_tokens"]
    return flops_per_token(recipe["model"], trained + frozen, block_tokens, trained)


def _trains(recipe: Mapping[str, Any]) -> Trains:
    if "trains" not in recipe:
        return ALL
    part, adapter = recipe["trains"]["part"], recipe["trains"]
    return Trains(
        part, Lora(adapter["rank"], adapter["alpha"], tuple(adapter["modules"])) if part == "lora" else None
    )
