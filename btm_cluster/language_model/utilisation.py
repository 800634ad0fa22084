"""Model FLOPs utilisation: how much of a GPU's arithmetic a training uses.

Shown while it runs; decides nothing.
"""

from transformers import PreTrainedModel

from btm_cluster.equations.budget import training_flops_per_token
from btm_cluster.language_model.demix import has_row_per_domain
from btm_cluster.requests import Resources

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
    parameters = sum(
        parameter.numel() // (len(parameter) if has_row_per_domain(name) else 1)
        for name, parameter in model.named_parameters()
    )
    layers, width = (getattr(model.config, name, 0) for name in ("num_hidden_layers", "hidden_size"))
    flops = training_flops_per_token(parameters, layers, width, block_tokens)
    return tokens_per_second * flops / (gpus * peak)
