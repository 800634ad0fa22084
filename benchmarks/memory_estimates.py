"""The estimate of a training's memory beside the most that torch's allocator held, on one GPU.

    python benchmarks/memory_estimates.py                       # all cases: about 5 minutes on an H200
    python benchmarks/memory_estimates.py llama-1b gpt2-1.3b    # those whose names begin so
    python benchmarks/memory_estimates.py --json memory.json

GPT-2 shapes of 125M, 350M and 1.3B parameters at 8 to 32 blocks of 1,024 tokens per forward pass, and the shape of
Llama-3.2-1B at 8 blocks of 2,048, all weights or LoRA, with and without activation checkpointing: random weights
and tokens, bf16, compiled, AdamW, three updates. Each case is a process of its own, and as many run at once as the
GPU has memory for by the estimates. An update of one forward pass replays CUDA graphs, one of two does not.

Prints a line per case, and ends with exit code 1 where an estimate is more than 15 % off. Without a GPU it prints
estimates alone.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bare_training import GPT2, Pace, Shape, compute_of, gpt2, spec_of
from large_models import SIZES as LARGE

from btm_cluster.driver.gpu_memory import TrainingMemory
from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.training import train
from btm_cluster.language_model.training_size import size_for
from btm_cluster.language_model.training_state import build_state
from btm_cluster.plan import BranchingPlan, ModelPlan, Trains
from btm_cluster.requests import Resources

UPDATES = 3
"""CUDA graphs are recorded in the second one, when Adam's moments are there."""
MOST_OFF = 0.15
AT_ONCE = 6
"""Processes: each compiles on several cores."""
SHARE = 0.85
"""Share of the GPU's memory that cases get at once: CUDA's contexts take some too."""


@dataclass(frozen=True)
class Case:
    """One training."""

    shape: Shape
    train: str = "all"
    recomputes: bool = False

    @property
    def model(self) -> dict[str, Any]:
        plan = ModelPlan(config=dict(self.shape.config))
        return full_config(plan, self.shape.vocabulary, self.shape.block_tokens)

    @property
    def trains(self) -> Trains:
        return trains_of(BranchingPlan.model_validate({"train": self.train}), self.model)

    @property
    def estimate(self) -> int:
        """Bytes at the peak."""
        shape, recomputing = self.shape, "on" if self.recomputes else "off"
        how = Resources(1, 1.0, 1, shape.micro_batch, "bfloat16", True, "none", recomputing)
        training = TrainingMemory(
            size_for(self.model, self.trains), how, shape.blocks, shape.block_tokens, False
        )
        return training.memory(None).peak


BATCHES = {8: 8, 16: 32, 32: 32}
"""Blocks per update, by those of a forward pass."""
LLAMA = replace(LARGE["llama-1b"], micro_batch=8)
CASES: Mapping[str, Case] = {
    f"gpt2-{name}, {micro_batch} of {blocks} blocks": Case(Shape(gpt2(*shape), 50_257, blocks, micro_batch))
    for name, shape in GPT2.items()
    for micro_batch, blocks in BATCHES.items()
} | {
    f"llama-1b, {train}{', activation checkpointing' if recomputes else ''}": Case(LLAMA, train, recomputes)
    for train in ("all", "lora")
    for recomputes in (False, True)
}


def measure(case: Case) -> int:
    """The most bytes that torch's allocator held in this process, which has done nothing before."""
    device = torch.device("cuda")
    compute = replace(compute_of(case.shape, device), recomputes=case.recomputes)
    compute.set_up()
    with tempfile.TemporaryDirectory() as scratch:
        spec = replace(spec_of(case.shape, UPDATES, 1, Path(scratch), compute), trains=case.trains)
        train(spec, build_state(spec, ProcessGroup.joined(device)), Pace(UPDATES))
    return torch.cuda.max_memory_allocated()


def measure_all(cases: Mapping[str, Case]) -> dict[str, int | str]:
    """The bytes of each case, or how it failed; the largest ones begin."""
    room = SHARE * torch.cuda.get_device_properties(0).total_memory
    waiting = sorted(cases, key=lambda name: -cases[name].estimate)
    found: dict[str, int | str] = {}
    running: dict[Future[int], str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(AT_ONCE, context, max_tasks_per_child=1) as pool:
        while waiting or running:
            taken = sum(cases[name].estimate for name in running.values())
            for name in list(waiting):
                if len(running) < AT_ONCE and (not running or taken + cases[name].estimate <= room):
                    running[pool.submit(measure, cases[name])] = name
                    waiting.remove(name)
                    taken += cases[name].estimate
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, failure = running.pop(future), future.exception()
                found[name] = future.result() if failure is None else f"{type(failure).__name__}: {failure}"
                print(_line(name, cases[name].estimate, found[name]), flush=True)
    return found


def _line(name: str, estimate: int, measured: int | str | None) -> str:
    said = f"{name:45} estimated {estimate / 1e9:6.2f} GB"
    if isinstance(measured, int):
        return f"{said}, measured {measured / 1e9:6.2f} GB, off by {estimate / measured - 1:+.1%}"
    return said if measured is None else f"{said}, {measured[:200]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="what their names begin with; default: all")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    begins = tuple(asked.cases) or ("",)
    cases = {name: case for name, case in CASES.items() if name.startswith(begins)}
    if not torch.cuda.is_available():
        for name, case in cases.items():
            print(_line(name, case.estimate, None))
        return 0
    began = time.monotonic()
    found = measure_all(cases)
    print(f"{len(found)} cases in {time.monotonic() - began:.0f} s on an {torch.cuda.get_device_name()}")
    if asked.json:
        rows = {n: {"estimated": cases[n].estimate, "measured": measured} for n, measured in found.items()}
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    off = [n for n, m in found.items() if not isinstance(m, int) or abs(cases[n].estimate / m - 1) > MOST_OFF]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
