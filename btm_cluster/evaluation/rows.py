"""Rows of a comparison's tables, and the names that systems are shown by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRANSFORMER_LM = "Transformer-LM"
BEST_MILESTONE = "Transformer-LM at its best milestone"
"""A row where that is not the finished one."""
SEED = "seed"
PAPER_ENSEMBLE = "ensemble, paper's posterior"
CALIBRATED_ENSEMBLE = "ensemble, calibrated"
GATED_ENSEMBLE = "ensemble, learned gate"
PLANNED_ENSEMBLE = "ensemble, as planned"
CLUSTER_ENSEMBLE = "ensemble, by cluster distance"
SEEDED_ENSEMBLE = "ensemble with the seed, calibrated"
SEEDED_GATE = "ensemble with the seed, learned gate"
PLANNED_SEEDED_ENSEMBLE = "ensemble with the seed, as planned"
BEST_EXPERT = "best single expert"
OWN_EXPERT = "the domain's own expert"
UNIFORM_AVERAGE = "average, uniform"
ARGMAX_AVERAGE = "average, argmax"
POSTERIOR_AVERAGE = "average, posterior"
PAPER_DEMIX = "DEMix, paper's posterior"
CALIBRATED_DEMIX = "DEMix, calibrated"
_MIXTURE_OF_EXPERTS = "mixture of experts"
SINGLE_MODELS = (BEST_EXPERT, UNIFORM_AVERAGE, ARGMAX_AVERAGE, POSTERIOR_AVERAGE)
"""Systems of a forest that cost no more than one model."""
_OTHER_BY_TEXT = (BEST_EXPERT, ARGMAX_AVERAGE, POSTERIOR_AVERAGE)


def top_k_ensemble(k: int) -> str:
    """The name of the ensemble of the k experts with the largest prior."""
    return f"ensemble, top-{k}"


def is_ensemble(system: str) -> bool:
    """Whether a system is one of the forest's ensembles."""
    return system.startswith("ensemble")


def mixture_of_experts(experts_per_token: int) -> str:
    """The name of the mixture of experts in which a token passes so many feed-forwards of a layer."""
    return f"{_MIXTURE_OF_EXPERTS}, top-{experts_per_token}"


def system_of_texts(system: str) -> str:
    """A system's name, which says where it is another model for each text."""
    return f"{system}, another for each text" if system in _OTHER_BY_TEXT else system


def is_mixture_of_experts(system: str) -> bool:
    """Whether a system is one of the forest's mixtures of experts."""
    return system.startswith(_MIXTURE_OF_EXPERTS)


def cost_text(cost: float) -> str:
    """An inference cost as tables and sentences have it, before the sign for times."""
    return f"{round(cost, 2):g}"


@dataclass(frozen=True)
class Cell:
    """A perplexity with its 95 % interval, bits per byte, and the perplexity's relative difference to the
    baseline with the paired interval."""

    perplexity: float
    interval: tuple[float, float]
    bits_per_byte: float
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A system on one split: a cell for each text, and for the means over those of a group.

    Groups are the domains and the targets that are compared on, `all` of these, and what is `left_out`,
    without a difference.
    """

    system: str
    inference_cost: float | None
    """Forward passes of a model for a token, by parameters; None where that is not known."""
    cells: Mapping[str, Cell]
    means: Mapping[str, Cell]


@dataclass(frozen=True)
class Milestones:
    """The Transformer-LM's milestones by update: perplexities on development
    text, mean over the founding domains."""

    perplexities: Mapping[int, float]
    best: int

    @property
    def last(self) -> int:
        """The update of the finished model."""
        return max(self.perplexities)

    @property
    def is_finished_best(self) -> bool:
        return self.best == self.last

    def to_json(self) -> dict[str, Any]:
        """Plain values for machines."""
        return {
            "best": self.best,
            "last": self.last,
            "development": {str(u): p for u, p in self.perplexities.items()},
        }
