"""Settles, where a training starts, what its resources leave to the memory of the GPU: sharding, activation
checkpointing and the blocks of a forward pass."""

import logging
from dataclasses import replace

import torch

from btm_cluster.driver.gpu_memory import problem_of, told, training_memory
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.requests import TrainRequest

log = logging.getLogger(__name__)


def settled(request: TrainRequest, group: ProcessGroup) -> TrainRequest:
    """The request with resources that leave nothing open, by the memory of the first rank's GPU. A collective.

    On CPU what is open is left undone, without an estimate.

    Raises:
        ResourcesError: it does not fit, by an estimate.
    """
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
    training = training_memory(request)
    if training is None:
        return request
    if problem := problem_of(request.label, training, there, goes_on=request.saved_at is not None):
        raise problem
    way = training.settled(there)
    how = replace(
        request.how,
        sharding="full" if way.is_sharded else "none",
        activation_checkpointing="on" if way.recomputes else "off",
        micro_batch_blocks=way.blocks
        if request.how.micro_batch_blocks == "auto"
        else request.how.micro_batch_blocks,
    )
    log.info("%s: %s", request.label, told(training, there))
    return replace(request, how=how)
