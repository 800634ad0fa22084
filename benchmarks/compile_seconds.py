"""Seconds until a training's passes are compiled: the whole model and LoRA, as a whole and layer by layer.

    python benchmarks/compile_seconds.py llama-1b                       on a GPU: Llama-3.2-1B's shape
    python benchmarks/compile_seconds.py toy --layers 16 --backend aot_eager

Each in a process of its own, with an empty cache of compiled code: seconds of the first forward and backward pass, of
the third, and the calls and graphs that Dynamo traced, with its graph breaks and recompilations. `aot_eager` traces
and partitions, and makes no code: on a CPU, making code for it takes most of the time. `--speed` trains LoRA for a
while instead, both ways, and prints tokens per second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bare_training import LLAMA_1B, Pace, Shape, compute_of, spec_of

from btm_cluster.language_model import update
from btm_cluster.language_model.deltas import trains_of
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.language_model.training import train
from btm_cluster.language_model.training_spec import TrainingSpec
from btm_cluster.language_model.training_state import TrainingState, build_state, write_state
from btm_cluster.plan import ALL, BranchingPlan

TOY = {**LLAMA_1B, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 8}
SIZES = {
    "toy": Shape(TOY, 512, 4, 2, 64),
    "llama-1b": Shape(LLAMA_1B, 128_256, 16, 8, 2048),
}
WAYS = ("whole", "layers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES, default="toy", nargs="?")
    parser.add_argument("--layers", type=int, help="others than the size has")
    parser.add_argument("--train", choices=("all", "lora"), nargs="*", default=["all", "lora"])
    parser.add_argument("--way", choices=WAYS, nargs="*", default=list(WAYS))
    parser.add_argument("--backend", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        (trained,), (way,) = asked.train, asked.way
        print(json.dumps({"train": trained, "way": way, **(speed if asked.speed else seconds)(asked)}))
        return
    for trained in asked.train:
        for way in asked.way:
            _in_process_of_its_own(asked, trained, way)


def _in_process_of_its_own(asked: argparse.Namespace, trained: str, way: str) -> None:
    layers = ["--layers", str(asked.layers)] if asked.layers else []
    command = [sys.executable, __file__, asked.size, *layers, "--train", trained, "--way", way]
    command += ["--backend", asked.backend, "--alone", *(["--speed"] if asked.speed else [])]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        subprocess.run(command, check=True, env=environment)


def seconds(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of passes, and what Dynamo traced for them."""
    from torch._dynamo.utils import counters

    with tempfile.TemporaryDirectory() as scratch:
        spec, state = training_of(asked, Path(scratch))
        made = update.Updates(spec, state, ProcessGroup.joined(spec.compute.device))
        took = []
        for _ in range(update.PASSES_UNTIL_RECORDED):
            began = time.perf_counter()
            made._backward(made._blocks(), spec.tokens_per_update)
            state.optimizer.drop_gradients()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took.append(round(time.perf_counter() - began, 2))
    return {
        "first_pass_seconds": took[0],
        "third_pass_seconds": took[-1],
        "calls": counters["stats"]["calls_captured"],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompilations": sum(counters["recompiles"].values()),
    }


def speed(asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second over the second half of 40 updates."""
    with tempfile.TemporaryDirectory() as scratch:
        spec, state = training_of(asked, Path(scratch))
        pace = Pace(spec.last_update)
        began = time.monotonic()
        train(spec, state, pace)
    assert pace.first_update is not None
    return {
        "tokens_per_second": round(pace.tokens_per_second),
        "seconds_to_first_update": round(pace.first_update - began, 1),
    }


def training_of(asked: argparse.Namespace, folder: Path) -> tuple[TrainingSpec, TrainingState]:
    """A training of what was asked for, compiled in the way that was."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (trained,), (way,) = asked.train, asked.way
    shape = SIZES[asked.size]
    if asked.layers:
        shape = replace(shape, config={**shape.config, "num_hidden_layers": asked.layers})
    compute = replace(compute_of(shape, device), compile=True, precision="bfloat16")
    compute.set_up()
    _compile(way, asked.backend)
    spec, group = spec_of(shape, 40, 1, folder, compute), ProcessGroup.joined(device)
    if trained == "lora":
        base = build_state(spec, group)
        files = write_state(base, folder, with_optimizer=False)
        del base
        branching = BranchingPlan.model_validate({"train": "lora"})
        spec = replace(spec, trains=trains_of(branching, spec.model), from_scratch=False)
    stored = None if spec.trains == ALL else TensorFiles(list(files.values()))
    return spec, build_state(spec, group, stored)


def _compile(way: str, backend: str) -> None:
    """Has trainings be compiled in one way, by one backend."""
    update.is_compiled_whole = lambda *_: way == "whole"
    if backend == "inductor":
        return
    compiles = torch.compile

    def by_backend(function: Any, dynamic: bool) -> Any:
        return compiles(function, dynamic=dynamic, backend=backend)

    def whole(module: torch.nn.Module, **_: Any) -> None:
        module._compiled_call_impl = by_backend(module._call_impl, dynamic=False)

    torch.compile = by_backend  # type: ignore[assignment]
    torch.nn.Module.compile = whole  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
