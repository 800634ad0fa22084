"""Settles, where a training starts, what its resources leave to the memory of the GPU: sharding and activation
checkpointing."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from btm_cluster.errors import ResourcesError
from btm_cluster.language_model.deltas import count_trained
from btm_cluster.language_model.layers import size_of
from btm_cluster.language_model.memory import USABLE_SHARE, Memory, Setting, Way, choose_way, memory_of
from btm_cluster.language_model.model import fresh_on_meta
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.requests import TrainRequest

log = logging.getLogger(__name__)
_SHARDING: Mapping[str, Setting] = {"auto": "auto", "none": "off", "full": "on"}


def settled(request: TrainRequest, group: ProcessGroup) -> TrainRequest:
    """The request with resources that leave nothing open, by the memory of the first rank's GPU. A collective.

    On CPU what is open is left undone, without an estimate.

    Raises:
        ResourcesError: its weights, gradients and moments alone are more than that.
    """
    if request.is_demix:
        return request
    if group.device.type == "cpu":
        how = request.how
        sharding = "none" if how.sharding == "auto" else how.sharding
        recomputing = "off" if how.activation_checkpointing == "auto" else how.activation_checkpointing
        return replace(request, how=replace(how, sharding=sharding, activation_checkpointing=recomputing))
    return settled_for(request, group.from_first(torch.cuda.get_device_properties(group.device).total_memory))


def settled_for(request: TrainRequest, there: float) -> TrainRequest:
    """The request with resources that leave nothing open, where a GPU has so many bytes.

    A worker that is given a part of it counts on that part, and may have more: it is not refused for it.
    """
    how = request.how
    trained, frozen = count_trained(request.model, request.trains)
    size = replace(size_of(fresh_on_meta(request.model)), parameters=trained + frozen, frozen=frozen)
    sharding = _SHARDING[how.sharding]
    usable = USABLE_SHARE * there * min(1.0, how.gpus_per_worker)
    way = choose_way(size, _way_of(request), usable, sharding, how.activation_checkpointing)
    memory = memory_of(size, way)
    _check_holds(request, memory, there)
    settled_how = replace(
        how,
        sharding="full" if way.is_sharded else "none",
        activation_checkpointing="on" if way.recomputes else "off",
    )
    words = "%s: about %.1f of %.1f GB on each GPU, sharding: %s, activation_checkpointing: %s"
    chosen = (settled_how.sharding, settled_how.activation_checkpointing)
    log.info(words, request.label, memory.total / 1e9, there / 1e9, *chosen)
    return replace(request, how=settled_how)


def _way_of(request: TrainRequest) -> Way:
    how = request.how
    blocks = -(-request.blocks_per_update // how.workers)
    return Way(
        ranks=how.workers,
        blocks=min(how.micro_batch_blocks, blocks),
        block_tokens=request.training.block_tokens,
        in_bfloat16=how.precision == "bfloat16",
        compiles=how.compile,
    )


def _check_holds(request: TrainRequest, memory: Memory, there: float) -> None:
    if memory.state > there:
        raise ResourcesError(
            f"{request.label} does not fit its GPUs",
            found=f"{memory.state / 1e9:.1f} GB of weights, gradients and Adam's moments on each",
            expected=f"at most {there / 1e9:.1f} GB",
            remedy="raise cluster.seed_gpus or cluster.gpus_per_expert, and leave cluster.sharding on auto",
        )
