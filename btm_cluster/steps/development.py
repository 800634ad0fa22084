"""Opens the development blocks that a training takes a loss on. Nothing that it makes depends on them."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from btm_cluster.curve import development_size
from btm_cluster.errors import StoreError
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.stored import open_held_out

log = logging.getLogger(__name__)


def open_development(request: TrainRequest, ledger: Ledger, group: ProcessGroup) -> torch.Tensor | None:
    """The first development blocks of the texts that a training learns from, equally many of each, as
    `TrainingSpec.development_DNT` has them.

    None where no text has any, one of a DEMix's has none, or one is lost: training goes on without, on all
    ranks.
    """
    training = request.training
    _, most = development_size(training.updates, training.blocks_per_domain_update)
    found: list[torch.Tensor] | None = None
    try:
        found = [_first_blocks(ledger, text.development, most) for text in request.texts]
    except StoreError as exc:
        log.warning("%s: trains without development loss: %s", request.label, exc)
    if any(group.any(found is None)) or found is None:
        return None
    if not request.is_demix:
        found = [blocks for blocks in found if len(blocks)]
    fewest = min(map(len, found), default=0)
    return torch.stack([blocks[:fewest] for blocks in found]) if fewest else None


def _first_blocks(ledger: Ledger, tokens: Sequence[Ref], most: int) -> torch.Tensor:
    """The first blocks of a text [blocks, block_tokens], `~token` where a token is read alone or padding."""
    blocks_NT, is_predicted_NT = open_held_out(ledger, tokens, most)
    return torch.from_numpy(np.where(is_predicted_NT, blocks_NT, ~blocks_NT))
