"""A model whose parameters, gradients and moments are spread over a process group: FSDP2.

Each rank holds its share of every tensor's rows, as `torch.chunk` cuts them. A layer's weights are gathered when
it is computed, and its gradient is summed over the ranks and cut again. Functions marked as collectives are called
by all ranks, or none.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from btm_cluster.language_model.compute import Compute
from btm_cluster.language_model.layers import units_of
from btm_cluster.language_model.model import (
    allocate,
    check_dtypes,
    name_tensors,
    unfit,
    weights_of,
)
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import names_in_order


def shard(model: PreTrainedModel, compute: Compute, group: ProcessGroup) -> None:
    """Spreads a model's parameters over the ranks, in place. A collective.

    Those on the meta device get memory, one layer at a time as a whole. Frozen ones may be of another precision
    than those that are trained.
    """
    mesh = init_device_mesh(compute.device.type, (group.world,))
    policy = MixedPrecisionPolicy()
    if compute.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (*units_of(model), model):
        allocate(unit, compute.device)
        # Resharded also after a forward pass without a backward one: between updates, all weights are shares.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def hand_out(model: PreTrainedModel, whole: PreTrainedModel | None, group: ProcessGroup) -> None:
    """Gives each rank its shares of `whole`, which the first rank has. A collective; one tensor at a time."""
    values = weights_of(whole) if whole is not None else {}
    for name, tensor in weights_of(model).items():
        value = values[name].to(group.device) if whole is not None else _empty_whole(tensor)
        dist.broadcast(value, src=0)
        take_own(tensor, value)


def _empty_whole(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def load_own(model: PreTrainedModel, weights: StoredWeights) -> None:
    """Loads this rank's shares of stored weights; one tensor at a time is read.

    Raises:
        IncompatibleError: naming tensors that are missing, unexpected or of another shape or dtype.
    """
    check_dtypes(model, weights)
    tensors, stored = weights_of(model), names_in_order(weights.header)
    shapes = {name: list(weights.header[name]["shape"]) for name in stored}
    found = {
        "missing": [name for name in tensors if name not in shapes],
        "unexpected": [name for name in stored if name not in model.state_dict()],
        "of another shape": [n for n, t in tensors.items() if n in shapes and shapes[n] != list(t.shape)],
    }
    if any(found.values()):
        raise unfit(weights, name_tensors(found))
    for name, tensor in tensors.items():
        take_own(tensor, weights.read(name))


@torch.no_grad()
def take_own(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies into `tensor` the part of `whole` that this rank holds."""
    own_part(tensor).copy_(_cut(tensor, whole))


def _cut(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return whole
    parts, rank = whole.chunk(tensor.device_mesh.size()), tensor.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]  # of fewer rows than ranks


def like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A tensor that is held as `parameter` is, with the values of `whole`."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device, copy=True)  # it may be a view of a mapped file
    tensor = torch.empty_like(parameter, dtype=whole.dtype, requires_grad=False)
    take_own(tensor, whole)
    return tensor


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether ranks hold shares of its parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    part: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def gather(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors by name, one at a time. A collective: every rank exhausts it."""
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[torch.nn.Parameter], largest: float) -> torch.Tensor:
    """Clips gradients by their norm over all parameters, and returns that. A collective where they are sharded."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm: Any = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(trained, largest, norm)
    whole: torch.Tensor = norm
    return whole
