"""A model and a number of updates that suit some texts and a machine: what `btm init` writes.

Bounded by how often text is worth reading, by the time that a first run may take, and by how many tokens a
model of a size wants. Plain arithmetic.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from btm_cluster.driver.rates import FORWARD_SHARE
from btm_cluster.equations.budget import training_flops_per_token

PASSES = 3.5
"""Over the smallest text: below the four at which `btm plan` warns, since sizes are estimates."""
TOKENS_PER_PARAMETER = 10
"""That an expert and its seed together read at least; about 20 are best where text costs nothing.

Source: Hoffmann et al., 2022, Training compute-optimal large language models.
"""
SEED_SHARE = 0.75
"""Small models do best with more than the paper's half: docs/results.md."""
CPU_HOURS, GPU_HOURS = 0.12, 4.0
"""Hours that a first run may take: with its report ten minutes on a CPU, an evening on GPUs."""
LEAST_UPDATES = 200
"""Smaller batches before fewer updates."""
LEAST_BLOCKS, WANTED_BLOCKS = 20, 100
"""Blocks of development text, and of test text, that a text should have: the least, and better."""
LEAST_HELD_OUT, MOST_HELD_OUT = 0.005, 0.1
"""Bounds of those shares of a text."""
_AVERAGES = 8
"""Models that are scored beside the experts: seed, baseline at its milestones, averages."""


@dataclass(frozen=True)
class ModelSize:
    """A model with what its training is known to want."""

    name: str
    layers: int
    width: int
    heads: int
    block_tokens: int
    vocabulary: int
    blocks_per_update: int
    learning_rate: float
    preset: str | None = None

    @property
    def parameters(self) -> int:
        """Parameters of GPT-2's architecture, with tied embeddings, without biases and norms."""
        return 12 * self.layers * self.width**2 + (self.vocabulary + self.block_tokens) * self.width

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training on one token."""
        return training_flops_per_token(self.parameters, self.layers, self.width, self.block_tokens)


SIZES = (
    ModelSize("tiny", 2, 128, 4, 128, 2048, 8, 3e-3),
    ModelSize("mini", 3, 192, 4, 256, 4096, 8, 3e-3),
    ModelSize("small", 4, 256, 4, 256, 8192, 8, 2e-3),
    ModelSize("medium", 6, 384, 6, 512, 16_384, 16, 1e-3),
    ModelSize("large", 8, 512, 8, 1024, 16_384, 32, 1e-3),
    ModelSize("gpt3-125m", 12, 768, 12, 1024, 32_768, 64, 6e-4, "gpt3-125m"),
    ModelSize("gpt3-350m", 24, 1024, 16, 1024, 32_768, 64, 3e-4, "gpt3-350m"),
    ModelSize("gpt3-750m", 24, 1536, 16, 1024, 32_768, 64, 2.5e-4, "gpt3-750m"),
    ModelSize("gpt3-1.3b", 24, 2048, 32, 1024, 32_768, 64, 2e-4, "gpt3-1.3b"),
)


@dataclass(frozen=True)
class Machine:
    """GPUs, or CPUs, that a first run will have."""

    name: str
    devices: int
    flops: float
    """That training sustains on each of them, in a second."""
    on_gpus: bool

    @property
    def hours(self) -> float:
        """Hours that a first run may take."""
        return GPU_HOURS if self.on_gpus else CPU_HOURS


@dataclass(frozen=True)
class Sizing:
    """The sizing that suits a machine."""

    size: ModelSize
    vocabulary: int
    updates: int
    blocks_per_update: int
    held_out_share: float
    """Share of each domain's documents in development text, and the same in test text."""
    passes: float
    """Passes over the smallest text."""
    hours: float


def size_for(domains: Mapping[str, int], target_tokens: int, machine: Machine) -> Sizing:
    """The largest model that the texts have enough tokens for and the machine enough time, and its updates.

    `domains` has each domain's tokens. Where no model is small enough, it is the smallest.
    """
    found = [_sizing(size, domains, target_tokens, machine) for size in SIZES]
    least = min(domains.values())
    fitting = [
        one
        for one in found
        if one.held_out_share * least >= LEAST_BLOCKS * one.size.block_tokens
        and _tokens_read(one, len(domains)) >= TOKENS_PER_PARAMETER * one.size.parameters
    ]
    return fitting[-1] if fitting else found[0]


def _sizing(size: ModelSize, domains: Mapping[str, int], target_tokens: int, machine: Machine) -> Sizing:
    least = max(1, min(domains.values()))
    share = math.ceil(1000 * WANTED_BLOCKS * size.block_tokens / least) / 1000
    share = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, share))
    train = least * (1 - 2 * share)
    held_out = 2 * share * sum(domains.values()) + target_tokens
    scored = FORWARD_SHARE * held_out * (len(domains) + _AVERAGES)
    in_time = 3600 * machine.hours * machine.devices * machine.flops / size.flops_per_token
    # Seed, experts and a baseline that does the experts' part once more.
    per_text = (in_time - scored) / (len(domains) * (2 - SEED_SHARE))
    tokens = max(0.0, min(PASSES * train, per_text))
    blocks = size.blocks_per_update
    while blocks > 1 and tokens < LEAST_UPDATES * blocks * size.block_tokens:
        blocks //= 2
    updates = max(8, _two_digits(tokens / (blocks * size.block_tokens)))
    read = updates * blocks * size.block_tokens
    spent = (read * len(domains) * (2 - SEED_SHARE) + scored) * size.flops_per_token
    vocabulary = min(size.vocabulary, max(300, _two_digits(sum(domains.values()) / 50)))
    hours = spent / machine.flops / machine.devices / 3600
    return Sizing(size, vocabulary, updates, blocks, share, read / train, hours)


def _tokens_read(sizing: Sizing, domains: int) -> float:
    """By the seed and then one expert."""
    per_text = sizing.updates * sizing.blocks_per_update * sizing.size.block_tokens
    return per_text * (SEED_SHARE * domains + 1 - SEED_SHARE)


def _two_digits(number: float) -> int:
    """Rounded down."""
    digits = 10 ** max(0, int(math.log10(max(number, 1))) - 1)
    return int(number // digits * digits)
