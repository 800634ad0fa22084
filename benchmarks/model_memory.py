"""Memory and seconds of a stored model: loaded, written at a training's end, and saved as a training checkpoint.

    python benchmarks/model_memory.py load                            # of 124M parameters, on the CPU
    python benchmarks/model_memory.py save --weights bfloat16
    python benchmarks/model_memory.py checkpoint --device cuda

Prints the most that this process owned on the host beyond what it held before (RssAnon: pages of mapped files are
the system's), and the same of the device.
"""

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from btm_cluster.language_model.configuration import full_config
from btm_cluster.language_model.model import build_model, load_model, save_weights, weights_of
from btm_cluster.language_model.optimizer import build_optimizer
from btm_cluster.language_model.stored_weights import TensorFiles
from btm_cluster.language_model.training_state import TrainingState, write_state
from btm_cluster.plan import ModelPlan, TrainingPlan
from btm_cluster.steps.checkpoints import TrainingCheckpoints


class NoStore:
    """A ledger that stores nothing: files are written, and forgotten."""

    def save_training(self, *_: Any) -> None:
        pass


def held() -> int:
    """Bytes of memory that are this process's own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@contextmanager
def measured(what: str, device: str) -> Iterator[None]:
    """Prints the peak over what is held now, looked at every millisecond."""
    gc.collect()
    before, peak, ends = held(), [0], threading.Event()
    on_device = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        on_device = torch.cuda.memory_allocated()

    def watch() -> None:
        while not ends.wait(0.001):
            peak[0] = max(peak[0], held())

    watching, started = threading.Thread(target=watch), time.monotonic()
    watching.start()
    yield
    seconds = time.monotonic() - started
    ends.set()
    watching.join()
    line = f"{what}: {(peak[0] - before) / 1e6:,.0f} MB on the host"
    if device == "cuda":
        line += f", {(torch.cuda.max_memory_allocated() - on_device) / 1e6:,.0f} MB on the device"
    print(f"{line}, {seconds:.2f} s")


def trained(config: dict[str, Any], device: str) -> TrainingState:
    """A model after an update, with its moments."""
    model = build_model(config, 0).to(device)
    state = TrainingState(model, build_optimizer(model, TrainingPlan()), 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step(learning_rate=0.0)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["load", "save", "checkpoint"])
    parser.add_argument("--preset", default="gpt3-125m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    asked = parser.parse_args()
    config = full_config(ModelPlan(preset=asked.preset), 50_257, 1024)
    dtype = getattr(torch, asked.weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.part == "load":
            tensors = {name: t.to(dtype) for name, t in weights_of(build_model(config, 0)).items()}
            save_weights(tensors, folder / "model.safetensors")
            tensors.clear()
            with measured("load", asked.device):
                load_model(config, TensorFiles([folder / "model.safetensors"]), asked.device)
            return
        state = trained(config, asked.device)
        if asked.part == "save":
            with measured("save", asked.device):
                write_state(state, folder, with_optimizer=True, dtype=dtype)
            return
        checkpoints = TrainingCheckpoints(NoStore(), None, "benchmark")  # type: ignore[arg-type]
        with measured("checkpoint", asked.device):
            moments, curve = state.moments(), state.recording.curve()
            checkpoints.save(1, state.weights(), moments, curve, {}, wait=True)


if __name__ == "__main__":
    main()
