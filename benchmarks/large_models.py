"""Models that fill a GPU or several: speed, memory and checkpoints of a group on one host.

    python benchmarks/large_models.py llama-1b --gpus 1
    python benchmarks/large_models.py qwen-7b --gpus 2 --sharding full --checkpoints 2
    python benchmarks/large_models.py qwen-7b --gpus 1 --train lora --rank 16 --json qwen.json

Shapes of Llama-3.2-1B, Qwen2.5-3B and Qwen2.5-7B with random weights, random tokens, bf16, compiled, AdamW, 20
updates. Prints a JSON object: tokens per second and MFU (medians over the second half of the updates: compiling is
left out), the most memory that torch held on a GPU beside what was estimated, and seconds from the start of the
processes to the first update. For each checkpoint, the seconds of copying it out, for which any training stands
still, those of storing the copy, for which only this one does, and its bytes. `--sharding`,
`--activation-checkpointing` and `--train` are the plan's fields.

Checkpoints go to `--store`, a folder on the disk that is to be measured, or with `--store nowhere` only to the host's
memory. A group saves at updates 9 and 17; the first copy also gets that memory. There must be room for two on that
disk, and for one where temporary files go. Without GPUs it runs a toy size on two
processes, to show that it works.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bare_training import LLAMA_1B, Pace, Shape, compute_of, spec_of

from btm_cluster.identity import Ref, identity_by
from btm_cluster.language_model.compute import Compute, device_name
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.deltas import FILES, trains_of
from btm_cluster.language_model.host_copy import HostCopy
from btm_cluster.language_model.memory import USABLE_SHARE, PassSettings, Setting, choose_settings, memory_of
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.tensor_files import WEIGHTS
from btm_cluster.language_model.training import train
from btm_cluster.language_model.training_size import size_for
from btm_cluster.language_model.training_state import TrainingState, build_state
from btm_cluster.ledger import Ledger
from btm_cluster.plan import BranchingPlan, ModelPlan, Trains
from btm_cluster.requests import Resources
from btm_cluster.steps.checkpoints import TrainingCheckpoints


def _qwen(width: int, inner: int, layers: int, heads: int, key_heads: int, is_tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    return {"model_type": "qwen2", **sizes, **attention, "tie_word_embeddings": is_tied}


SIZES = {  # vocabulary, blocks per GPU and update, blocks per forward pass, tokens per block
    "toy": Shape(_qwen(64, 160, 2, 4, 2, False), 512, 8, 4, 64),
    "llama-1b": Shape(LLAMA_1B, 128_256, 16, 8, 2048),
    "qwen-3b": Shape(_qwen(2048, 11_008, 36, 16, 2, True), 151_936, 16, 4, 2048),
    "qwen-7b": Shape(_qwen(3584, 18_944, 28, 28, 4, False), 152_064, 16, 4, 2048),
}
NOWHERE = "nowhere"


@dataclass(frozen=True)
class Asked:
    """Settings of one measurement."""

    size: str
    gpus: int
    updates: int
    checkpoints: int
    sharding: str
    activation_checkpointing: Setting
    micro_batch: int
    train: Literal["all", "feed-forward", "lora"]
    rank: int
    store: str
    began: float
    """By time.monotonic, before the processes start."""

    @property
    def shape(self) -> Shape:
        return replace(SIZES[self.size], micro_batch=self.micro_batch or SIZES[self.size].micro_batch)

    @property
    def model(self) -> dict[str, Any]:
        shape = self.shape
        return full_config(ModelPlan(config=dict(shape.config)), shape.vocabulary, shape.block_tokens)

    @property
    def trains(self) -> Trains:
        lora = {"lora": {"rank": self.rank}} if self.train == "lora" else {}
        return trains_of(BranchingPlan.model_validate({"train": self.train, **lora}), self.model)


@dataclass(frozen=True)
class Name:
    """A request's name, by which checkpoints are stored."""

    ref: Ref
    recipe: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[Ref, ...]] = field(default_factory=dict)


MODEL = Name(Ref("model", identity_by("model", {}, {})))


@dataclass
class Saving(Pace):
    """The train loop's callbacks of one rank that also save: whenever they may, but for the first time, which a
    group may at every eighth update."""

    ledger: Ledger | None = None
    wanted: int = 0
    saved: list[dict[str, float]] = field(default_factory=list)
    calls: int = 0
    weights_file: str = WEIGHTS
    copies_only: bool = False

    def __post_init__(self) -> None:
        assert self.ledger is not None
        file = self.weights_file
        self.checkpoints = TrainingCheckpoints(self.ledger, MODEL, "benchmark", weights_file=file)
        self.copies = HostCopy(), HostCopy()

    def should_save(self) -> bool:
        self.calls += 1
        return self.calls > 1 and len(self.saved) < self.wanted

    def save(self, state: TrainingState, wait: bool) -> None:  # noqa: ARG002 (to measure it, it always waits)
        weights, moments = state.weights(), state.moments()
        if not ProcessGroup.joined(torch.device("cpu")).is_first:
            deque(chain(weights, moments), maxlen=0)
            self.saved.append({})
        elif self.copies_only:
            self.saved.append(self._copy(weights, moments))
        else:
            self.checkpoints.save(state.update, weights, moments, state.recording.curve(), {}, wait=True)
            self.saved.append(self._last())
        if dist.is_initialized():
            dist.barrier()

    def _copy(self, *tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        began = time.monotonic()
        taken = [copy.take(each).values() for copy, each in zip(self.copies, tensors, strict=True)]
        seconds = round(time.monotonic() - began, 2)
        return {"stall_seconds": seconds, "bytes": sum(tensor.nbytes for tensor in chain(*taken))}

    def _last(self) -> dict[str, float]:
        assert self.ledger is not None
        stored = self.ledger.latest_training(MODEL.ref.identity)
        return {
            "stall_seconds": round(self.checkpoints.stall_seconds or 0, 2),
            "storing_seconds": round(self.checkpoints.upload_seconds or 0, 2),
            "bytes": sum(blob.size_bytes for blob in stored.blobs) if stored is not None else 0,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", nargs="?", choices=SIZES, default="toy")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="default: all")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--checkpoints", type=int, default=0, help="how many on the way")
    parser.add_argument("--sharding", choices=("auto", "none", "full"), default="auto")
    parser.add_argument("--activation-checkpointing", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--micro-batch", type=int, default=0, help="blocks per forward pass")
    parser.add_argument("--train", choices=("all", "feed-forward", "lora"), default="all")
    parser.add_argument("--rank", type=int, default=16, help="of --train lora")
    parser.add_argument("--store", help=f"default: a temporary folder; {NOWHERE}: nothing is stored")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fields = {name: value for name, value in vars(asked).items() if name != "json"}
        fields |= {"gpus": asked.gpus or 2, "store": asked.store or str(Path(scratch, "store"))}
        measured = measure(Asked(**fields, began=time.monotonic()), Path(scratch))
    print(json.dumps(measured, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(asked: Asked, scratch: Path) -> dict[str, Any]:
    """One training, in one process per GPU."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = mp.spawn(_rank, (asked, scratch, results), nprocs=asked.gpus, join=False)
    assert ranks is not None
    while not ranks.join():
        pass
    found: dict[str, Any] = results.get()
    return found


def _rank(rank: int, asked: Asked, scratch: Path, results: "mp.SimpleQueue[dict[str, Any]]") -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if asked.gpus > 1:
        rendezvous = f"file://{scratch}/rendezvous"
        dist.init_process_group("nccl" if on_gpu else "gloo", rendezvous, rank=rank, world_size=asked.gpus)
    group = ProcessGroup.joined(device)
    compute, estimate = _settled(asked, device)
    (scratch / str(rank)).mkdir()
    spec = spec_of(asked.shape, asked.updates, asked.gpus, scratch / str(rank), compute)
    spec = replace(spec, trains=asked.trains)
    how = Resources(asked.gpus, 1.0, 1, compute.micro_batch_blocks, compute.precision, compute.compile)
    compute.set_up()
    pace = Saving(
        asked.updates,
        how=how,
        block_tokens=asked.shape.block_tokens,
        ledger=Ledger.open(str(scratch) if asked.store == NOWHERE else asked.store),
        wanted=asked.checkpoints,
        weights_file=FILES[asked.train],
        copies_only=asked.store == NOWHERE,
    )
    train(spec, build_state(spec, group), pace)
    pace.checkpoints.close()
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if on_gpu else 0), device=device)
    if asked.gpus > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if group.is_first:
        results.put(_summary(asked, compute, pace, peak.item(), estimate))
    if asked.gpus > 1:
        dist.destroy_process_group()


def _settled(asked: Asked, device: torch.device) -> tuple[Compute, int]:
    """How the group computes, and the bytes that are expected on each GPU."""
    compute, shape = compute_of(asked.shape, device), asked.shape
    size = size_for(asked.model, asked.trains)
    bf16, blocks = compute.precision == "bfloat16", min(shape.blocks, shape.micro_batch)
    passes = -(-shape.blocks // blocks)
    settings = PassSettings(asked.gpus, blocks, shape.block_tokens, bf16, compute.compile, passes=passes)
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1e12
    sharding: Setting = "auto" if asked.sharding == "auto" else "on" if asked.sharding == "full" else "off"
    settings = choose_settings(size, settings, USABLE_SHARE * there, sharding, asked.activation_checkpointing)
    settled = replace(compute, is_sharded=settings.is_sharded, recomputes=settings.recomputes)
    return settled, memory_of(size, settings).peak


def _summary(asked: Asked, compute: Compute, pace: Saving, peak: float, estimate: int) -> dict[str, Any]:
    assert pace.first_update is not None
    return {
        "size": asked.size,
        "gpus": asked.gpus,
        "device": device_name(compute.device),
        "sharding": "full" if compute.is_sharded else "none",
        "activation_checkpointing": "on" if compute.recomputes else "off",
        "train": f"lora, rank {asked.rank}" if asked.train == "lora" else asked.train,
        "tokens_per_pass": asked.shape.micro_batch * asked.shape.block_tokens,
        "tokens_per_second": round(pace.tokens_per_second),
        "mfu": round(statistics.median(pace.mfu), 4) if pace.mfu else None,
        "peak_gb": round(peak / 1e9, 2),
        "estimated_gb": round(estimate / 1e9, 2),
        "seconds_to_first_update": round(pace.first_update - asked.began, 1),
        "checkpoints": pace.saved,
    }


if __name__ == "__main__":
    main()
