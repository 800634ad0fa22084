"""The groups of workers that the trainings to come ask for, with what their memory follows from."""

from collections.abc import Collection, Mapping
from typing import Any

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.gpu_memory import TrainingMemory, training_memory
from btm_cluster.driver.recipes import expert_resources
from btm_cluster.errors import PlanError
from btm_cluster.language_model.deltas import count_trained, trains_of
from btm_cluster.language_model.memory import ModelSize
from btm_cluster.language_model.training_size import count_by_muon, size_for
from btm_cluster.plan import BranchingPlan, Plan, Trains
from btm_cluster.requests import Resources, StepRequest, TrainRequest

_NEW_EXPERT = "an expert"


def demands_of(asked: Collection[StepRequest], plan: Plan) -> tuple[Demand, ...]:
    """One for each size of group and of model, and one for each training that goes on."""
    trainings = [request for request in asked if isinstance(request, TrainRequest)]
    experts = sum(request.role == "expert" for request in trainings)
    seen: dict[object, Demand] = {}
    for request in trainings:
        demand = _demand(request, experts, plan)
        goes_on = demand.label if demand.saved_at is not None else ""
        seen.setdefault((demand.how, demand.memory, goes_on), demand)
    return tuple(seen.values())


def demand_of_expert(plan: Plan, model: Mapping[str, Any], experts: int) -> Demand:
    """The demand of one of so many new experts of a model, by its configuration."""
    trains, how, training = trains_of(plan.branching, model), expert_resources(plan), plan.training
    trained, frozen = count_trained(model, trains)
    with_muon = training.optimizer == "muon" and trains.lora is None
    by_muon = count_by_muon(model, trains, with_muon)
    memory = None
    if how.gpus_per_worker:
        blocks = training.blocks_per_domain_update, training.block_tokens
        at_once, lora = _at_once(how, experts, plan), _with_lora(model, trains)
        memory = TrainingMemory(size_for(model, trains, with_muon), how, *blocks, True, at_once, lora)
    return Demand(_NEW_EXPERT, how, parameters=trained, by_muon=by_muon, frozen=frozen, memory=memory)


def _demand(request: TrainRequest, experts: int, plan: Plan) -> Demand:
    is_expert = request.role == "expert"
    is_new_expert = is_expert and request.saved_at is None
    label = f"expert {request.label}" if is_expert else request.label
    trained, frozen = count_trained(request.model, request.trains)
    at_once = _at_once(request.how, experts, plan) if is_expert else 1  # a seed is trained before them
    lora = _with_lora(request.model, request.trains) if is_new_expert else None
    return Demand(
        _NEW_EXPERT if is_new_expert else label,
        request.how,
        request.saved_at,
        parameters=trained,
        by_muon=count_by_muon(request.model, request.trains, request.by_muon),
        frozen=frozen,
        memory=training_memory(request, at_once, lora),
    )


def _at_once(how: Resources, experts: int, plan: Plan) -> int:
    """Experts that share a GPU."""
    if not 0 < how.gpus_per_worker < 1:
        return 1
    return max(
        1, min(int(1 / how.gpus_per_worker + 1e-9), experts, plan.cluster.concurrent_experts or experts)
    )


def _with_lora(model: Mapping[str, Any], trains: Trains) -> ModelSize | None:
    """The sizes of an expert that trains all, if it were to train an adapter instead; None where it could not."""
    if trains.is_delta:
        return None
    try:
        return size_for(model, trains_of(BranchingPlan.model_validate({"train": "lora"}), model))
    except PlanError:
        return None
