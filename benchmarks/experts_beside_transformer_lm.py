"""Experts on as many GPUs as there are, beside a Transformer-LM over all of them: the paper's speed claim.

    python benchmarks/experts_beside_transformer_lm.py 125m 350m 1.3b llama-1b --json speed.json

For each size, on one host: one expert alone on one GPU; an expert on each GPU at once, which share nothing;
and the Transformer-LM over all GPUs, which share gradients at every update. All take the same blocks per GPU
and update. Prints tokens and updates per second (medians over the second half of the updates: compiling is
left out), the experts' sum as a share of the ideal (one alone, times GPUs), the Transformer-LM's scaling
efficiency from one GPU, and experts over Transformer-LM. Random tokens, bf16, compiled, AdamW. Without GPUs
it runs a toy size on two processes, to show that it works.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bare_training import GPT2, LLAMA_1B, Pace, Shape, gpt2, train_bare

SIZES = {  # blocks per GPU and update, then blocks per forward pass
    "toy": Shape(gpt2(1, 64, 2), 512, 4, 4),
    "125m": Shape(gpt2(*GPT2["125m"]), 50_304, 32, 32),
    "350m": Shape(gpt2(*GPT2["350m"]), 50_304, 32, 16),
    "1.3b": Shape(gpt2(*GPT2["1.3b"]), 50_304, 16, 8),
    "llama-1b": Shape(LLAMA_1B, 50_304, 16, 8),
}


@dataclass(frozen=True)
class Row:
    """Tokens per second of one size on one number of GPUs."""

    size: str
    gpus: int
    alone: float
    """One expert, on one GPU, while the others are idle."""
    alone_mfu: float
    experts: float
    """An expert on each GPU, together."""
    transformer_lm: float
    tokens_per_update: int
    """One GPU's."""

    @property
    def of_ideal(self) -> float:
        return self.experts / (self.gpus * self.alone)

    @property
    def scaling(self) -> float:
        return self.transformer_lm / (self.gpus * self.alone)

    @property
    def ratio(self) -> float:
        return self.experts / self.transformer_lm


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}; default: toy")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="default: all")
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if unknown := set(asked.sizes) - SIZES.keys():
        parser.error(f"no size: {', '.join(sorted(unknown))}")
    rows = []
    print(
        "| size | GPUs | one expert, tokens/s | MFU | experts, tokens/s | of the ideal | Transformer-LM, "
        "tokens/s | scaling | updates/s, experts : Transformer-LM | ratio |\n" + "|---" * 10 + "|"
    )
    for size in asked.sizes or ["toy"]:
        row = measure(size, asked.gpus or 2, asked.updates)
        rows.append(row)
        print(_line(row), flush=True)
        if asked.json:
            shown = [
                asdict(r) | {"of_ideal": r.of_ideal, "scaling": r.scaling, "ratio": r.ratio} for r in rows
            ]
            asked.json.write_text(json.dumps(shown, indent=1) + "\n")


def _line(row: Row) -> str:
    # An update of the Transformer-LM takes the tokens of one update of every expert.
    updates = (
        row.experts / row.gpus / row.tokens_per_update,
        row.transformer_lm / row.gpus / row.tokens_per_update,
    )
    return (
        f"| {row.size} | {row.gpus} | {row.alone:,.0f} | {row.alone_mfu:.1%} | {row.experts:,.0f} | "
        f"{row.of_ideal:.1%} | {row.transformer_lm:,.0f} | {row.scaling:.1%} | "
        f"{updates[0]:.2f} : {updates[1]:.2f} | {row.ratio:.2f} |"
    )


def measure(size: str, gpus: int, updates: int) -> Row:
    """The three ways, one after the other, in one process per GPU."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        start, results = context.Barrier(gpus), context.SimpleQueue()
        arguments = [(rank, gpus, size, updates, scratch, start, results) for rank in range(gpus)]
        processes = [context.Process(target=_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(f"{size}: a process ended with {[p.exitcode for p in processes]}")
        told: list[tuple[str, float, float]] = [results.get() for _ in range(gpus + 2)]
    rates = {way: [rate for named, rate, _ in told if named == way] for way in ("alone", "experts", "group")}
    mfu = next(share for way, _, share in told if way == "alone")
    shape = SIZES[size]
    return Row(
        size,
        gpus,
        rates["alone"][0],
        mfu,
        sum(rates["experts"]),
        rates["group"][0],
        shape.blocks * shape.block_tokens,
    )


def _rank(
    rank: int,
    world: int,
    size: str,
    updates: int,
    scratch: str,
    start: Barrier,
    results: "mp.SimpleQueue[tuple[str, float, float]]",
) -> None:
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    folder = Path(scratch, str(rank))
    folder.mkdir()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "benchmark-inductor")))
    shape = SIZES[size]

    def tell(way: str, pace: Pace) -> None:
        results.put((way, pace.tokens_per_second, statistics.median(pace.mfu) if pace.mfu else 0.0))

    if rank == 0:  # alone first, so that the others find its compiled code
        tell("alone", train_bare(shape, updates, 1, folder, device))
    start.wait()
    tell("experts", train_bare(shape, updates, 1, folder, device))
    _free(device)
    start.wait()
    address = f"file://{scratch}/group"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=address, rank=rank, world_size=world
    )
    pace = train_bare(shape, updates, world, folder, device)
    if rank == 0:
        tell("group", pace)
    dist.barrier()
    dist.destroy_process_group()


def _free(device: torch.device) -> None:
    """Frees the GPU memory of the last training."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    time.sleep(0.1)


if __name__ == "__main__":
    main()
