"""Whether a training fits the memory of its GPUs, and the nearest setting of the plan by which it would.

Pure: how much memory a GPU has comes in, and None where nobody could look. Imports torch only where something
is computed, since commands that compute nothing import this too.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

from btm_cluster.errors import ResourcesError
from btm_cluster.language_model.memory import (
    USABLE_SHARE,
    Memory,
    ModelSize,
    PassSettings,
    Setting,
    choose_settings,
    memory_of,
)
from btm_cluster.language_model.pass_blocks import choose_with_blocks
from btm_cluster.requests import Resources, TrainRequest

GIGABYTE = 1e9
MOST_GPUS = 64
"""Largest group that is proposed where the cluster's GPUs are not known."""
_SHARDING: dict[str, Setting] = {"auto": "auto", "none": "off", "full": "on"}
_NAMES = {"optimizer": "moments", "copies": "copies and buffers"}


@dataclass(frozen=True)
class TrainingMemory:
    """Size and settings of a training on GPUs, by which its memory is estimated; some settings may be open."""

    size: ModelSize
    how: Resources
    blocks_per_update: int
    block_tokens: int
    is_expert: bool
    at_once: int = 1
    """Trainings that a GPU has at the same time."""
    with_lora: ModelSize | None = None
    """The sizes of an expert that trains all, if it were to train an adapter."""

    @property
    def settings(self) -> PassSettings:
        """How a rank computes, with whole models and nothing computed twice; where the blocks of a pass are left open,
        in one pass."""
        from btm_cluster.language_model.head import LOGITS_AT_ONCE
        from btm_cluster.language_model.loss import LARGEST_BLOCK_LOGITS

        of_rank = -(-self.blocks_per_update // self.how.workers)
        asked = self.how.micro_batch_blocks
        blocks = of_rank if asked == "auto" else min(asked, of_rank)
        bfloat16 = self.how.precision == "bfloat16"
        passes = -(-of_rank // blocks)
        in_pieces = self.block_tokens * self.size.vocabulary > LARGEST_BLOCK_LOGITS["cuda"]
        return PassSettings(
            self.how.workers,
            blocks,
            self.block_tokens,
            bfloat16,
            self.how.compile,
            passes=passes,
            logits_at_once=LOGITS_AT_ONCE["cuda"] if in_pieces else None,
        )

    def settled(self, gpu_bytes: float | None) -> PassSettings:
        """How it computes on GPUs with so much memory. Of a part of a GPU it counts on that part."""
        usable = (
            math.inf if gpu_bytes is None else USABLE_SHARE * gpu_bytes * min(1.0, self.how.gpus_per_worker)
        )
        how = self.how
        choose = choose_with_blocks if how.micro_batch_blocks == "auto" else choose_settings
        return choose(self.size, self.settings, usable, _SHARDING[how.sharding], how.activation_checkpointing)

    def memory(self, gpu_bytes: float | None) -> Memory:
        """The estimate on GPUs with so much memory."""
        return memory_of(self.size, self.settled(gpu_bytes))

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU holds all that it has at once."""
        return self.at_once * self.memory(gpu_bytes).peak <= gpu_bytes


def training_memory(
    request: TrainRequest, at_once: int = 1, with_lora: ModelSize | None = None
) -> TrainingMemory | None:
    """Size and settings of a requested training; None on a CPU, and for a DEMix, whose memory is not estimated."""
    from btm_cluster.language_model.training_size import size_for

    if request.is_demix or not request.how.gpus_per_worker:
        return None
    return TrainingMemory(
        size_for(request.model, request.trains, request.by_muon),
        request.how,
        max(1, request.blocks_per_update),
        request.training.block_tokens,
        request.role == "expert",
        at_once,
        with_lora,
    )


def problem_of(
    label: str, training: TrainingMemory, gpu_bytes: float, goes_on: bool = False
) -> ResourcesError | None:
    """The refusal of a training that cannot fit GPUs of so much memory, with the nearest setting that does.

    One that `goes_on` has run with its settings before: it is refused only where what it holds whatever the
    blocks is too much.
    """
    memory = training.memory(gpu_bytes)
    if memory.state <= gpu_bytes if goes_on else training.fits(gpu_bytes):
        return None
    several = f", of {training.at_once} at once" if training.at_once > 1 else ""
    return ResourcesError(
        f"{label} does not fit the memory of its GPUs",
        found=f"{_parts(memory)}{several}",
        expected=f"at most {_gigabytes(gpu_bytes)}",
        remedy=_remedy(training, gpu_bytes),
    )


def told(training: TrainingMemory, gpu_bytes: float | None) -> str:
    """The memory of a training on each of its GPUs, in words."""
    settings = training.settled(gpu_bytes)
    memory = memory_of(training.size, settings)
    of = f" of {_gigabytes(gpu_bytes)}" if gpu_bytes is not None else ""
    how = [name for name, chosen in _CHOICES.items() if getattr(settings, chosen)]
    by = f", by {' and '.join(how)}" if how else ""
    if training.how.micro_batch_blocks == "auto":
        by += f", with {settings.blocks} blocks in a forward pass"
    each = f", and {training.at_once} at once" if training.at_once > 1 else ""
    return f"{_parts(memory, of)}{by}{each}"


_CHOICES = {"sharding": "is_sharded", "activation checkpointing": "recomputes"}


def _parts(memory: Memory, of: str = "") -> str:
    parts = {name: size for name, size in asdict(memory).items() if name != "peak"}
    shown = ", ".join(f"{_NAMES.get(name, name)} {size / GIGABYTE:.1f}" for name, size in parts.items())
    return f"about {_gigabytes(memory.peak)}{of} at its peak on each GPU ({shown}, not all at once)"


def _gigabytes(size: float) -> str:
    return f"{size / GIGABYTE:,.1f} GB"


def _remedy(training: TrainingMemory, gpu_bytes: float) -> str:
    found = []
    for setting, changed in _changes(training):
        if changed.fits(gpu_bytes):
            found.append(f"{setting} (about {_gigabytes(changed.memory(gpu_bytes).peak)})")
            break
    if training.with_lora is not None:
        adapted = replace(training, size=training.with_lora, with_lora=None)
        if adapted.fits(gpu_bytes):
            found.append(f"`branching.train: lora` (about {_gigabytes(adapted.memory(gpu_bytes).peak)})")
    if not found:
        return (
            f"take a smaller `model`, or GPUs with more memory: no micro-batch fits, with activation "
            f"checkpointing and sharded over up to {MOST_GPUS} GPUs"
        )
    return "take " + ", or ".join(found)


def _changes(training: TrainingMemory) -> Iterator[tuple[str, TrainingMemory]]:
    """Settings of the plan's `cluster` that need less memory, the cheapest first."""
    how = training.how
    yield from _smaller_batches(training, "")
    gpus = "gpus_per_expert" if training.is_expert else "seed_gpus"
    for number in range(training.at_once - 1, 0, -1):
        fewer = replace(training, how=replace(how, gpus_per_worker=1 / number), at_once=number)
        yield f"`cluster.{gpus}: {1 / number:.3g}`", fewer
    if how.activation_checkpointing == "off":
        recomputed = replace(training, how=replace(how, activation_checkpointing="on"))
        yield "`cluster.activation_checkpointing: on`", recomputed
        yield from _smaller_batches(recomputed, "`cluster.activation_checkpointing: on` and ")
    can_shard = not training.size.by_muon  # which takes its steps over whole matrices
    sharding: Literal["auto", "none"] = "auto" if can_shard else "none"
    free = replace(how, activation_checkpointing="auto", sharding=sharding)
    if can_shard and how.workers > 1 and how.sharding == "none":
        yield "`cluster.sharding: auto`", replace(training, how=free)
    workers = 2
    while workers <= min(MOST_GPUS, training.blocks_per_update):
        if workers > how.workers:
            more = replace(training, how=replace(free, workers=workers, gpus_per_worker=1.0), at_once=1)
            setting = f"`cluster.{gpus}: {workers}`"
            yield setting, more
            yield from _smaller_batches(more, f"{setting} and ")
        workers *= 2


def _smaller_batches(training: TrainingMemory, before: str) -> Iterator[tuple[str, TrainingMemory]]:
    # Where they are left open, there are as few as can be by now.
    blocks = 0 if training.how.micro_batch_blocks == "auto" else training.settings.blocks // 2
    while blocks:
        how = replace(training.how, micro_batch_blocks=blocks)
        yield f"{before}`cluster.micro_batch_blocks: {blocks}`", replace(training, how=how)
        blocks //= 2
