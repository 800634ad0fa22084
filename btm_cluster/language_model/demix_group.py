"""A DEMix over a process group: which rank trains which domains, and what the ranks then tell each other.

A rank holds the feed-forwards of its own domains alone, and all that is shared. DistributedDataParallel keeps
what is shared in step over all ranks; a domain's feed-forwards are kept in step here, within that domain's
ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from btm_cluster.language_model.demix import has_row_per_domain


@dataclass(frozen=True)
class Share:
    """The share of one of a group's ranks: its domains, and, where several ranks
    share a domain, its index among them."""

    domains: range
    ranks_per_domain: int
    number: int


def share_of(rank: int, world: int, domains: int) -> Share:
    """Spreads domains over ranks, or ranks over domains: one number divides the other."""
    assert world % domains == 0 or domains % world == 0, f"{domains} domains on {world} ranks"
    if world < domains:
        each = domains // world
        return Share(range(rank * each, (rank + 1) * each), 1, 0)
    ranks = world // domains
    return Share(range(rank // ranks, rank // ranks + 1), ranks, rank % ranks)


class DemixGroup:
    """Values that ranks share. Every method is a collective: all ranks call it, or none."""

    def __init__(self, model: PreTrainedModel, share: Share) -> None:
        self._parameters = dict(model.named_parameters())
        self._share = share
        self._world = dist.get_world_size()
        self._domains_ranks: dist.ProcessGroup | None = None
        if share.ranks_per_domain > 1:
            ranks = range(0, self._world, share.ranks_per_domain)
            groups = [dist.new_group(list(range(first, first + share.ranks_per_domain))) for first in ranks]
            self._domains_ranks = groups[share.domains.start]

    def hide_from(self, loss: torch.nn.Module) -> None:
        """Before `loss`, with the model as `model`, is made data parallel: leaves
        the feed-forwards to this group."""
        names = [f"model.{name}" for name in self._parameters if has_row_per_domain(name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, names)  # type: ignore[no-untyped-call]

    def clip_gradients(self, largest: float) -> torch.Tensor:
        """Sums each domain's gradients over its ranks, then clips all by the norm
        over everything that any rank trains."""
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        own = [gradient for name, gradient in gradients.items() if has_row_per_domain(name)]
        self._sum(own)
        shared = [gradient for name, gradient in gradients.items() if not has_row_per_domain(name)]
        squares = get_total_norm(own).square()
        dist.all_reduce(squares)
        norm = (get_total_norm(shared).square() + squares / self._share.ranks_per_domain).sqrt()
        clip_grads_with_norm_(self._parameters.values(), largest, norm)
        return norm

    def _sum(self, gradients: list[torch.Tensor]) -> None:
        if self._domains_ranks is not None:
            sums = [
                dist.all_reduce(gradient, group=self._domains_ranks, async_op=True) for gradient in gradients
            ]
            for under_way in sums:
                under_way.wait()
        for gradient in gradients:
            # The loss is scaled for the mean that data parallelism takes of what is shared.
            gradient /= self._world


def gather_domains(tensors: Mapping[str, torch.Tensor], share: Share) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name with the rows of all domains, one after the other.

    A collective: every rank exhausts it.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    for name, tensor in tensors.items():
        if world == 1 or not has_row_per_domain(name):
            yield name, tensor
            continue
        of_ranks = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(of_ranks, tensor.contiguous())
        yield name, torch.cat(of_ranks[:: share.ranks_per_domain])
