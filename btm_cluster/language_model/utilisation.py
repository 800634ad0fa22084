"""Model FLOPs utilisation: how much of a device's arithmetic a training uses, or can be expected to use.

Shown before and while it runs; decides nothing.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from btm_cluster.equations.budget import inference_flops_per_token, training_flops_per_token
from btm_cluster.language_model.demix import has_row_per_domain
from btm_cluster.requests import Resources

GPU_UTILISATION = 0.35
"""To be expected of a training in bfloat16, compiled: a bare loop over 125M to 1.3B parameters reaches 0.40 to
0.49 on an H200, smaller models less."""
CPU_UTILISATION = 0.5
"""To be expected of a training in float32, over what the same CPU reaches in multiplying matrices: 0.56 at 0.7M
parameters, 0.63 at 5M."""
_MATRIX_ROWS = 512
_REPEATS = 5
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}
"""Dense bfloat16, by NVIDIA's data sheets: of names that hold another, the longer one first."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by the name that torch gives it; None where the table lacks it."""
    found = (tera for name, tera in _PEAK_TFLOPS.items() if name in device_name)
    return next((1e12 * tera for tera in found), None)


def utilisation(
    model: PreTrainedModel, how: Resources, block_tokens: int, tokens_per_second: float, device_name: str
) -> float | None:
    """MFU of a training's GPUs, or of its share of one; None where the peak
    of its arithmetic is not known."""
    peak = peak_flops(device_name)
    gpus = how.workers * how.gpus_per_worker
    if peak is None or not gpus or how.precision != "bfloat16":
        return None
    # Of a DEMix a token takes one domain's feed-forwards, of however many this process holds.
    counts = [
        (parameter.numel() // (len(parameter) if has_row_per_domain(name) else 1), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    ]
    parameters, trained = sum(count for count, _ in counts), sum(count for count, learns in counts if learns)
    layers, width = (getattr(model.config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    flops = training_flops_per_token(parameters, layers, width, block_tokens, trained)
    return tokens_per_second * flops / (gpus * peak)


def flops_per_token(
    model: Mapping[str, Any], parameters: int, block_tokens: int, trained: int | None = None
) -> int:
    """Operations of an update for each token, by a model's configuration and size; `trained` as for
    `training_flops_per_token`."""
    return training_flops_per_token(parameters, *_layers_and_width(model), block_tokens, trained)


def inference_flops(model: Mapping[str, Any], parameters: int, block_tokens: int) -> int:
    """Operations of a forward pass for each token, by a model's configuration and the parameters that a token
    passes."""
    return inference_flops_per_token(parameters, *_layers_and_width(model), block_tokens)


def _layers_and_width(model: Mapping[str, Any]) -> tuple[int, int]:
    layers = next((model[name] for name in ("num_hidden_layers", "n_layer") if name in model), 0)
    width = next((model[name] for name in ("hidden_size", "n_embd") if name in model), 0)
    return layers, width


def cpu_flops() -> float:
    """Float32 FLOP/s of one CPU of this machine, in multiplying matrices: the best of a few, in about 20 ms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = torch.randn(_MATRIX_ROWS, _MATRIX_ROWS)
        seconds = min(_seconds_to_multiply(rows) for _ in range(_REPEATS))
    finally:
        torch.set_num_threads(threads)
    return 2 * _MATRIX_ROWS**3 / seconds


def _seconds_to_multiply(rows: torch.Tensor) -> float:
    began = time.perf_counter()
    _ = rows @ rows
    return max(time.perf_counter() - began, 1e-9)
