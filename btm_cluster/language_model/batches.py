"""The blocks of each update, as one rank of a group takes them.

They are a function of the update alone, so that resuming costs nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch

from btm_cluster.data.blocks import block_order
from btm_cluster.language_model.demix_group import Share
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training_spec import TextBlocks, TrainingSpec


def blocks_of_update(
    spec: TrainingSpec, update: int, group: ProcessGroup, share: Share | None
) -> torch.Tensor:
    """This rank's blocks of an update, int64 [blocks, block_tokens], equally
    many of each text over all ranks; `~token` where a token is read alone.

    For a DEMix, those of the rank's own domains, domain after domain.
    """
    orders = [_order_of(text, spec, update) for text in spec.texts]
    if share is None:
        # Every world-th of all texts' rows together, of which only these are read.
        count = spec.training.blocks_per_domain_update
        firsts = [(group.rank - i * count) % group.world for i in range(len(orders))]
        taken = [
            (text, order[first :: group.world])
            for text, order, first in zip(spec.texts, orders, firsts, strict=True)
        ]
    else:
        taken = [(spec.texts[d], orders[d][share.number :: share.ranks_per_domain]) for d in share.domains]
    return torch.from_numpy(np.concatenate([text.take(indices) for text, indices in taken]))


def _order_of(text: TextBlocks, spec: TrainingSpec, update: int) -> np.ndarray:
    """Indices of the blocks of a text that all ranks together take in an update."""
    count = spec.training.blocks_per_domain_update
    position = (update - spec.first_update if spec.restart_data else update) * count
    # An expert's order must not repeat the seed's: it would see the same blocks first, twice.
    random_seed = spec.training.random_seed + (1 if spec.restart_data else 0)
    return block_order(random_seed, text.identity, len(text.blocks), position, count)


def split_into_micro_batches(
    blocks: torch.Tensor, at_once: int, share: Share | None
) -> Sequence[torch.Tensor]:
    """Splits a rank's blocks into forward passes.

    A DEMix routes blocks by their place, so each pass has equally many of each domain.
    """
    if share is None:
        return torch.split(blocks, at_once)
    domains = len(share.domains)
    by_domain = torch.split(blocks.view(domains, -1, blocks.shape[-1]), max(1, at_once // domains), dim=1)
    return [part.flatten(0, 1) for part in by_domain]
