"""The part of a model that a training changes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Part: TypeAlias = Literal["all", "feed-forward", "lora"]
"""All weights, those of the feed-forwards, or adapters of low rank beside linear layers."""

ALL_LINEAR = "all-linear"
"""All linear layers but the output layer, in PEFT's words."""


@dataclass(frozen=True)
class Lora:
    """An adapter: ΔW = alpha/rank · B·A for each linear layer of these names."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Names as PEFT matches them: the last of a layer's whole name, sorted."""

    @property
    def scale(self) -> float:
        """The factor of B·A."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Trains:
    """The weights that a training changes; all others are frozen, and the stored model is without them."""

    part: Part = "all"
    lora: Lora | None = None
    """The adapter of the part `lora`; None otherwise."""

    @property
    def is_delta(self) -> bool:
        """Whether what is stored is only what changed of the model that training started from."""
        return self.part != "all"

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Its place in a recipe: nothing where all is trained."""
        if not self.is_delta:
            return {}
        return {"trains": {"part": self.part} | (asdict(self.lora) if self.lora else {})}

    @property
    def facts(self) -> Mapping[str, str]:
        """Its place in an artifact's facts, by which the artifact is known to need its start."""
        return {"trains": self.part} if self.is_delta else {}


ALL = Trains()
