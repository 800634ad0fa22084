"""The groups of workers that the trainings to come ask for, with what their memory follows from."""

from collections.abc import Collection, Mapping
from typing import Any

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.gpu_memory import training_memory
from btm_cluster.errors import PlanError
from btm_cluster.language_model.deltas import count_trained, trains_of
from btm_cluster.language_model.memory import ModelSize
from btm_cluster.language_model.training_size import size_for
from btm_cluster.plan import BranchingPlan, Plan
from btm_cluster.requests import StepRequest, TrainRequest


def demands_of(asked: Collection[StepRequest], plan: Plan) -> tuple[Demand, ...]:
    """One for each size of group and of model, and one for each training that goes on."""
    trainings = [request for request in asked if isinstance(request, TrainRequest)]
    experts = sum(request.role == "expert" for request in trainings)
    seen: dict[object, Demand] = {}
    for request in trainings:
        demand = _demand(request, _at_once(request, experts, plan))
        goes_on = demand.label if demand.saved_at is not None else ""
        seen.setdefault((demand.how, demand.memory, goes_on), demand)
    return tuple(seen.values())


def _demand(request: TrainRequest, at_once: int) -> Demand:
    label = f"expert {request.label}" if request.role == "expert" else request.label
    is_new_expert = request.role == "expert" and request.saved_at is None
    trained, frozen = count_trained(request.model, request.trains)
    return Demand(
        "an expert" if is_new_expert else label,
        request.how,
        request.saved_at,
        parameters=trained,
        frozen=frozen,
        memory=training_memory(request, at_once, _with_lora(request) if is_new_expert else None),
    )


def _at_once(request: TrainRequest, experts: int, plan: Plan) -> int:
    """Experts that share a GPU. A seed is trained before them."""
    gpus = request.how.gpus_per_worker
    if request.role != "expert" or not 0 < gpus < 1:
        return 1
    return min(int(1 / gpus + 1e-9), experts, plan.cluster.concurrent_experts or experts)


def _with_lora(request: TrainRequest) -> ModelSize | None:
    """The sizes of an expert that trains all, if it were to train an adapter instead; None where it could not."""
    if request.trains.is_delta:
        return None
    model: Mapping[str, Any] = request.model
    try:
        return size_for(model, trains_of(BranchingPlan.model_validate({"train": "lora"}), model))
    except PlanError:
        return None
