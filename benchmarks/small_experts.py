"""Small experts side by side on one GPU: tokens per second of all together, by how many there are.

    python benchmarks/small_experts.py 3m --experts 1 2 4 8 16
    python benchmarks/small_experts.py 14m --blocks 32 --ways graphs mps+graphs --record

Each expert is a process of its own, as with `gpus_per_expert: 0.125`, that trains on random tokens: bf16, compiled,
AdamW, blocks of 1,024 tokens. `graphs` is what the train loop does: an update in one forward pass replays CUDA graphs.
`plain` launches kernel by kernel. `mps+` lets kernels of several processes run at once, by NVIDIA's multi-process
service, which the script starts for itself and ends; without it, processes take turns. All start to count together,
once they are compiled, and count for `--seconds`.

The row is that of eight experts as the train loop is, beside eight without CUDA graphs. On a CPU it runs a toy size.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from bare_training import Shape, compute_of, gpt2, spec_of
from results import Result, finish, parse, this_machine, today

from btm_cluster.errors import Stopped
from btm_cluster.language_model import update
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training import UpdateReport, train
from btm_cluster.language_model.training_state import TrainingState, build_state

SIZES = {"toy": (1, 64, 2), "3m": (4, 256, 4), "14m": (8, 384, 6)}
"""Layers, width and heads."""
WAYS = ("graphs", "plain", "mps+graphs", "mps+plain")
VOCABULARY = 16_384
WARM_UP_UPDATES = 30
LONGEST_SECONDS = 300
"""To wait for the others to be compiled."""


@dataclass
class Window:
    """The train loop's callbacks: they count the updates of a stretch of time."""

    start: Barrier
    seconds: float
    calls: int = 0
    counted_from: tuple[int, float] | None = None
    updates_per_second: float = field(default=0.0)

    def should_stop(self) -> bool:
        self.calls += 1
        if self.calls == WARM_UP_UPDATES:
            _synchronize()
            self.start.wait(LONGEST_SECONDS)
            self.counted_from = self.calls, time.perf_counter()
        if self.counted_from is None or time.perf_counter() - self.counted_from[1] < self.seconds:
            return False
        _synchronize()
        first, began = self.counted_from
        self.updates_per_second = (self.calls - first) / (time.perf_counter() - began)
        return True

    def should_save(self) -> bool:
        return False

    def save(self, state: TrainingState, wait: bool) -> None:
        pass

    def passed_milestone(self, state: TrainingState) -> None:
        pass

    def report(self, state: TrainingState, report: UpdateReport) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--blocks", type=int, default=8, help="of an update, and of its one forward pass")
    parser.add_argument("--experts", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--ways", choices=WAYS, nargs="*", default=list(WAYS[:3]))
    parser.add_argument("--seconds", type=float, default=8)
    asked = parse(parser)
    found: dict[str, dict[int, float]] = {}
    for way in asked.ways:
        with _service(way.startswith("mps+")):
            for experts in asked.experts:
                rates = measure(asked, way, experts)
                found.setdefault(way, {})[experts] = sum(rates)
                print(
                    f"{asked.size}, {way}, {experts} experts: {sum(rates):,.0f} tokens/s together", flush=True
                )
    if all(8 in found.get(way, ()) for way in ("graphs", "plain")):
        finish([_row(asked, found)], asked)


def measure(asked: argparse.Namespace, way: str, experts: int) -> list[float]:
    """Tokens per second of each of so many experts."""
    context = mp.get_context("spawn")
    start, results = context.Barrier(experts), context.SimpleQueue()
    arguments = (asked.size, asked.blocks, way.endswith("graphs"), asked.seconds, start, results)
    processes = [context.Process(target=_expert, args=arguments) for _ in range(experts)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise SystemExit(f"{len(failed)} of {experts} experts failed")
    return [results.get() for _ in processes]


def _expert(
    size: str,
    blocks: int,
    with_graphs: bool,
    seconds: float,
    start: Barrier,
    results: "mp.SimpleQueue[float]",
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if not with_graphs:
        update.Updates._fits_a_graph = lambda _: False  # type: ignore[method-assign]
    shape = Shape(gpt2(*SIZES[size]), VOCABULARY, blocks, blocks)
    compute = compute_of(shape, device)
    compute.set_up()
    window = Window(start, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        spec = spec_of(shape, 10**9, 1, Path(scratch), compute)
        try:
            train(spec, build_state(spec, ProcessGroup.joined(device)), window)
        except Stopped:
            results.put(window.updates_per_second * spec.tokens_per_update)


@contextmanager
def _service(is_wanted: bool) -> Iterator[None]:
    """NVIDIA's multi-process service for processes that are started within."""
    if not is_wanted:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for each in own.values():
            Path(each).mkdir()
        os.environ |= own
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input="quit\n", text=True, check=False)
            for name in own:
                del os.environ[name]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _row(asked: argparse.Namespace, found: Mapping[str, Mapping[int, float]]) -> Result:
    others: dict[str, Any] = {
        f"{experts} experts, {way}": f"{rate:,.0f} tokens/s"
        for way, rates in found.items()
        for experts, rate in rates.items()
    }
    return Result(
        name="small-expert",
        what=f"eight experts of a GPT-2 shape of {asked.size}, {asked.blocks} blocks of 1,024 tokens per update, "
        f"bf16, each a process that replays CUDA graphs",
        machine=this_machine(),
        measured=today(),
        unit="tokens/s",
        better="higher",
        ours=found["graphs"][8],
        theirs=found["plain"][8],
        peer="eight such processes that launch kernel by kernel",
        goal=2.0,
        limit=None,
        limit_is=None,
        beside=others,
    )


if __name__ == "__main__":
    main()
