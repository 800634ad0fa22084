"""Requests that make one model of several, and the search for an average's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from btm_cluster.identity import Inputs, Ref
from btm_cluster.requests.request import Resources, StepRequest


@dataclass(frozen=True)
class FittedWeights:
    """Weights of an average that an artifact holds in its facts, by model: the fit
    of a text, or the result of a search."""

    fit: Ref
    name: str
    """Which of those that it holds."""


@dataclass(frozen=True)
class MergeRequest(StepRequest):
    """Make one model of several that have a common ancestor."""

    kind: ClassVar[str] = "model"
    label: str
    models: tuple[Ref, ...]

    @property
    def _ordered(self) -> tuple[Ref, ...]:
        return tuple(sorted(self.models, key=lambda model: model.identity))


@dataclass(frozen=True)
class AverageRequest(MergeRequest):
    """Average models into one.

    The weights are given, in order of the models, or those of a fit, made or still to be made.
    """

    weights: tuple[float, ...] | FittedWeights
    unrelated: bool = False
    """Average models without a common ancestor too: a control, whose result is noise."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        if isinstance(self.weights, FittedWeights):
            return {"weights": self.weights.name}
        by_model = dict(zip(self.models, self.weights, strict=True))
        return {"weights": [by_model[model] for model in self._ordered]}

    @property
    def inputs(self) -> Inputs:
        fit = (self.weights.fit,) if isinstance(self.weights, FittedWeights) else ()
        return {"models": self._ordered, "fit": fit}

    @property
    def shown(self) -> str:
        return f"averages of {len(self.models)} models"

    @property
    def batch(self) -> object:
        return "averages", self.models, self.unrelated  # which are read once


TaskVectorMethod: TypeAlias = Literal["task-arithmetic", "ties"]


@dataclass(frozen=True)
class TaskVectorRequest(MergeRequest):
    """Merge models by their task vectors: their differences to the model that all of them branched from."""

    base: Ref
    method: TaskVectorMethod
    scale: float
    """λ, by which the merged task vector is multiplied."""
    density: float
    """Share of each tensor's differences that `ties` keeps; 1 for task arithmetic, which keeps all."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {"method": self.method, "scale": self.scale, "density": self.density}

    @property
    def inputs(self) -> Inputs:
        return {"models": self._ordered, "base": (self.base,)}


@dataclass(frozen=True)
class MixtureOfExpertsRequest(MergeRequest):
    """Make one mixture of experts of several models: their feed-forwards, behind a router in every layer."""

    rest: Ref
    """The model that attention, embeddings and norms are of: the seed, or an average."""
    tokens: tuple[tuple[Ref, ...], ...]
    """Development blocks of each model's domain, in order of the models: routers are fitted on them."""
    experts_per_token: int
    blocks: int
    """How many development blocks of each domain are looked at, at most."""
    how: Resources

    @property
    def ordered_tokens(self) -> tuple[tuple[Ref, ...], ...]:
        """Development blocks in order of the models by identity, which is that of the experts."""
        by_model = dict(zip(self.models, self.tokens, strict=True))
        return tuple(by_model[model] for model in self._ordered)

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {
            "experts_per_token": self.experts_per_token,
            "blocks": self.blocks,
            "shards": [len(tokens) for tokens in self.ordered_tokens],
        }

    @property
    def inputs(self) -> Inputs:
        tokens = tuple(ref for shards in self.ordered_tokens for ref in shards)
        return {"models": self._ordered, "rest": (self.rest,), "tokens": tokens}

    @property
    def group(self) -> Resources:
        return self.how


@dataclass(frozen=True)
class SoupRequest(StepRequest):
    """Search for the weights by which an average of models does best on development text.

    The artifact's facts hold them as a fit's do; the model itself is then an AverageRequest's.
    """

    kind: ClassVar[str] = "soup"
    label: str
    strategy: Literal["greedy", "learned"]
    models: tuple[Ref, ...]
    """The experts, and the seed where it may have a part in it: any models with a common ancestor."""
    tokens: tuple[Ref, ...]
    blocks: int
    """How many development blocks are looked at, at most."""
    starts: tuple[FittedWeights, ...]
    """Averages from which `learned` sets out too, beside the best expert and the
    uniform one: the prior's, for instance."""
    how: Resources

    @property
    def recipe(self) -> Mapping[str, Any]:
        return {
            "strategy": self.strategy,
            "blocks": self.blocks,
            "starts": [start.name for start in self.starts],
        }

    @property
    def inputs(self) -> Inputs:
        return {
            "models": tuple(sorted(self.models, key=lambda model: model.identity)),
            "tokens": self.tokens,
            "fit": tuple(start.fit for start in self.starts),
        }

    @property
    def group(self) -> Resources:
        return self.how
