"""Specification of one training, with its texts opened: all that the train loop is told. Knows no store."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btm_cluster.data.blocks import READ, Blocks
from btm_cluster.language_model.compute import Compute
from btm_cluster.plan import ALL, TrainingPlan, Trains


@dataclass(frozen=True)
class TextBlocks:
    """A text's training blocks. Their order is a function of its identity."""

    identity: str
    blocks: Blocks
    marks: Blocks | None = None
    """Each token's mark, where some are read alone."""

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Blocks at `indices` [n], as int64 [n, block_tokens]: `~token` for a token that is read alone."""
        tokens = self.blocks.take(indices)
        return tokens if self.marks is None else np.where(self.marks.take(indices) == READ, ~tokens, tokens)


@dataclass(frozen=True)
class TrainingSpec:
    """Train a model from `first_update` to `last_update` on blocks of its texts, equally many of each."""

    label: str
    """Names the training in messages."""
    model: Mapping[str, Any]
    """The transformers configuration in full."""
    texts: tuple[TextBlocks, ...]
    first_token: int
    """Token after which each block is read."""
    training: TrainingPlan
    first_update: int
    last_update: int
    milestones: tuple[int, ...]
    """Updates at which the milestone callback is called."""
    from_scratch: bool
    """Whether the weights at `first_update` are drawn from the random seed, not another model's."""
    rewarms: bool
    """Whether the learning rate rises anew from `first_update` on, since the optimiser starts anew there."""
    restart_data: bool
    """Whether block order starts anew at `first_update`, in an order of its own."""
    is_demix: bool
    """One feed-forward per text in every layer."""
    compute: Compute
    divergence_remedy: str
    """The remedy in the error message where the loss is not finite."""
    trains: Trains = ALL
    """The weights that change; all others are frozen."""
    development_DNT: torch.Tensor | None = None
    """Development blocks [texts, blocks, block_tokens] to take a loss on now and then, int64, `~token` where a
    token is read alone or padding. Of a DEMix, those of every text in order; of another model, of any."""
    trace_file: Path | None = None
    """Where a profiler's trace of a few updates is written, `.json.gz`; None: nowhere."""

    @property
    def blocks_per_update(self) -> int:
        """Blocks of all texts together."""
        return len(self.texts) * self.training.blocks_per_domain_update

    @property
    def ends(self) -> tuple[int, ...]:
        """Updates after which the model may be stored for good."""
        return (*self.milestones, self.last_update)

    @property
    def predicts_all(self) -> bool:
        """Whether every token of every block is predicted, rather than some read alone."""
        return all(text.marks is None for text in self.texts)

    @property
    def tokens_per_update(self) -> int:
        """Tokens that are read."""
        return self.blocks_per_update * self.training.block_tokens
