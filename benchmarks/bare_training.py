"""This project's train loop on random tokens, without a store or Ray, for measurements of its speed."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from btm_cluster.data.blocks import Blocks
from btm_cluster.driver.gpu_memory import TrainingMemory
from btm_cluster.language_model.compute import Compute
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training import UpdateReport, train
from btm_cluster.language_model.training_size import size_for
from btm_cluster.language_model.training_spec import TextBlocks, TrainingSpec
from btm_cluster.language_model.training_state import TrainingState, build_state
from btm_cluster.language_model.utilisation import utilisation
from btm_cluster.plan import ModelPlan, TrainingPlan
from btm_cluster.requests import Resources

Optimizer: TypeAlias = Literal["adamw", "muon"]
RANDOM_BLOCKS = 512

GPT2 = {"125m": (12, 768, 12), "350m": (24, 1024, 16), "1.3b": (24, 2048, 32)}
"""Layers, width and heads of GPT-3's sizes."""
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
"""Llama-3.2-1B."""


def gpt2(layers: int, width: int, heads: int) -> dict[str, Any]:
    """A configuration."""
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}


@dataclass(frozen=True)
class Shape:
    """A model's size and what one worker takes per update."""

    config: Mapping[str, Any]
    vocabulary: int
    blocks: int
    """Per worker and update."""
    micro_batch: int
    block_tokens: int = 1024


@dataclass
class Pace:
    """The train loop's callbacks: they save nothing, and note how fast it goes."""

    updates: int
    rates: list[float] = field(default_factory=list)
    """Tokens per second of the whole group, each over about a second of the second half."""
    mfu: list[float] = field(default_factory=list)
    """Model FLOPs utilisation of one worker."""
    first_update: float | None = None
    """When the first report came, by time.monotonic."""
    how: Resources | None = None
    block_tokens: int = 1024
    at_half: Callable[[], None] | None = None
    """Called once, when the second half has begun."""

    def should_stop(self) -> bool:
        return False

    def should_save(self) -> bool:
        return False

    def save(self, state: TrainingState, wait: bool) -> None:
        pass

    def passed_milestone(self, state: TrainingState) -> None:
        pass

    def report(self, state: TrainingState, report: UpdateReport) -> None:
        self.first_update = self.first_update or time.monotonic()
        if state.update <= self.updates // 2:
            return
        if self.at_half is not None:
            self.at_half()
            self.at_half = None
        self.rates.append(report.tokens_per_second)
        if self.how is not None and torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            self.mfu.append(
                utilisation(state.model, self.how, self.block_tokens, report.tokens_per_second, name) or 0.0
            )

    @property
    def tokens_per_second(self) -> float:
        """Median over the second half: compiling is left out."""
        return statistics.median(self.rates)


def compute_of(shape: Shape, device: torch.device) -> Compute:
    """bf16, compiled, on a GPU; float32 on a CPU."""
    on_gpu = device.type == "cuda"
    return Compute(device, 1, shape.micro_batch, "bfloat16" if on_gpu else "float32", compile=on_gpu)


def spec_of(shape: Shape, updates: int, workers: int, folder: Path, compute: Compute) -> TrainingSpec:
    """A training from scratch on random tokens, which are written below `folder`."""
    file = folder / "tokens.npy"
    if not file.exists():
        tokens = np.random.default_rng(0).integers(1, shape.vocabulary, (RANDOM_BLOCKS, shape.block_tokens))
        np.save(file, tokens.astype(np.uint16 if shape.vocabulary <= 2**16 else np.uint32))
    return TrainingSpec(
        label="benchmark",
        model=full_config(ModelPlan(config=dict(shape.config)), shape.vocabulary, shape.block_tokens),
        texts=(TextBlocks("random", Blocks([file])),),
        first_token=0,
        training=TrainingPlan(
            updates=updates,
            blocks_per_domain_update=workers * shape.blocks,
            block_tokens=shape.block_tokens,
        ),
        first_update=0,
        last_update=updates,
        milestones=(),
        from_scratch=True,
        rewarms=False,
        restart_data=False,
        is_demix=False,
        compute=compute,
        divergence_remedy="",
    )


def train_bare(
    shape: Shape,
    updates: int,
    workers: int,
    folder: Path,
    device: torch.device,
    optimizer: Optimizer = "adamw",
    at_half: Callable[[], None] | None = None,
) -> Pace:
    """Trains a model of this shape from scratch; in a group of `workers`, which this process has joined, or
    alone. A micro-batch of 0 is the largest that fits, by the estimate."""
    if not shape.micro_batch:
        shape = replace(shape, micro_batch=most_blocks(shape, workers, device, optimizer))
    compute = compute_of(shape, device)
    spec = spec_of(shape, updates, workers, folder, compute)
    spec = replace(spec, training=spec.training.model_copy(update={"optimizer": optimizer}))
    compute.set_up()
    how = Resources(workers, 1.0, 1, shape.micro_batch, compute.precision, compute.compile)
    pace = Pace(updates, how=how, block_tokens=shape.block_tokens, at_half=at_half)
    train(spec, build_state(spec, ProcessGroup.joined(device)), pace)
    return pace


def most_blocks(shape: Shape, workers: int, device: torch.device, optimizer: Optimizer = "adamw") -> int:
    """The blocks of a forward pass that `micro_batch_blocks: auto` takes."""
    how = Resources(workers, float(device.type == "cuda"), 1, "auto", "bfloat16", compile=True)
    if device.type != "cuda":
        return how.blocks_at_once
    model = full_config(ModelPlan(config=dict(shape.config)), shape.vocabulary, shape.block_tokens)
    size = size_for(model, with_muon=optimizer == "muon")
    training = TrainingMemory(size, how, workers * shape.blocks, shape.block_tokens, is_expert=False)
    return training.settled(torch.cuda.get_device_properties(device).total_memory).blocks
