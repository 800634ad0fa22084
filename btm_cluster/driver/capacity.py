"""Whether machines can hold what trainings ask for, and the refusal where they cannot.

Knows neither Ray nor plans.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from btm_cluster.driver.gpu_memory import TrainingMemory, problem_of
from btm_cluster.errors import ResourcesError
from btm_cluster.requests import Resources, TrainRequest

NEW_RESOURCES = "--new-resources"


@dataclass(frozen=True)
class Demand:
    """A group of workers that something asks for."""

    label: str
    how: Resources
    saved_at: int | None = None
    """The update of the training checkpoint whose resources these are; None: they are the plan's."""
    remedy: str | None = None
    """Where they are neither's."""
    parameters: int = 0
    """Parameters that are trained; 0 for other steps."""
    by_muon: int = 0
    """Parameters among them of which the optimiser keeps one moment, not two."""
    frozen: int = 0
    """Parameters of the model beside these, which are not."""
    memory: TrainingMemory | None = None
    """Memory of its GPUs, by its settings; None where it is no training on GPUs."""

    @property
    def description(self) -> str:
        """The group that is asked for, in words."""
        return f"{self.how.workers} worker(s) with {_describe(bundle(self.how))} each"

    @property
    def origin(self) -> str:
        """Where the resources come from, if not from the plan."""
        if self.saved_at is None:
            return ""
        return (
            f"with which the training was started whose checkpoint at update {self.saved_at} it goes on from"
        )


def demand_of(request: TrainRequest) -> Demand:
    """The demand of a training."""
    return Demand(request.label, request.how, request.saved_at)


def bundle(how: Resources) -> dict[str, float]:
    """The resources of one worker of a group."""
    asked: dict[str, float] = {"CPU": float(how.cpus_per_worker)}
    if how.gpus_per_worker:
        asked["GPU"] = float(how.gpus_per_worker)
    return asked


def fits(nodes: Sequence[Mapping[str, float]], how: Resources) -> bool:
    """Whether nodes with these resources, empty, can hold the group."""
    return groups_held(nodes, how) >= 1


def groups_held(nodes: Sequence[Mapping[str, float]], how: Resources) -> int:
    """How many such groups nodes with these resources, empty, can hold at once."""
    return sum(_fitting(node, bundle(how)) for node in nodes) // how.workers


def no_capacity(
    demand: Demand, place: str, nodes: Sequence[Mapping[str, float]], elsewhere: str
) -> ResourcesError:
    """The refusal of a demand that a place, `nodes`, can never meet;
    `elsewhere` says what else would help."""
    less = "lower seed_gpus, seed_cpus, gpus_per_expert or cpus_per_expert in the plan's `cluster`"
    if demand.saved_at is not None:
        less = f"go on with the plan's resources by {NEW_RESOURCES}, which the model's profile then tells"
    return ResourcesError(
        f"{place} can never hold {demand.label}",
        found=f"nodes with {describe_nodes(nodes)}",
        expected=", ".join(filter(None, [demand.description, demand.origin])) + "; a worker on one node",
        remedy=demand.remedy or f"{less}, or {elsewhere}",
    )


def memory_problem(demand: Demand, gpu_bytes: float | None) -> ResourcesError | None:
    """The refusal of a training that cannot fit GPUs of so much memory; None where that is not known."""
    if demand.memory is None or gpu_bytes is None:
        return None
    return problem_of(demand.label, demand.memory, gpu_bytes, goes_on=demand.saved_at is not None)


def describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    """The resources of nodes, in words."""
    return "; ".join(_describe(node) for node in nodes) or "nothing"


def _fitting(node: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """How many bundles a node can hold."""
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items())


def _describe(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
