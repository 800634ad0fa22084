"""Rates of training a plan's model on a device: stated in the plan, measured in the store, or estimated.

A device is a GPU or a CPU. Knows no machine: what this one has comes in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from btm_cluster.driver.recipes import expert_resources, seed_resources
from btm_cluster.language_model.deltas import count_trained, trains_of
from btm_cluster.language_model.utilisation import (
    CPU_UTILISATION,
    GPU_UTILISATION,
    cpu_flops,
    flops_per_token,
    peak_flops,
)
from btm_cluster.ledger import Ledger
from btm_cluster.plan import ALL, Part, Plan, Trains

ASSUMED_GPU = "A100"
"""Where a plan wants GPUs and there is none to look at."""
FORWARD_SHARE = 1 / 3
"""Share of the forward pass in an update's FLOPs: scoring a token costs that share of training on it."""
RECOMPUTED_SHARE = 4 / 3
"""FLOPs of an update with activation checkpointing, over those without: one more forward pass."""


@dataclass(frozen=True)
class Rate:
    """Tokens that one device trains on in a second, and where that is from."""

    tokens_per_second: float
    origin: str
    is_estimate: bool = False

    def hours(self, tokens: float) -> float:
        """Device-hours to train on so many tokens."""
        return tokens / self.tokens_per_second / 3600


@dataclass(frozen=True)
class Rates:
    """The rates of a plan's trainings, by whether they are on GPUs."""

    whole: Mapping[bool, Rate]
    """Where all is trained, as of seed and Transformer-LM."""
    experts: Mapping[bool, Rate]
    """Where what experts train is."""


def rates_of(plan: Plan, model: Mapping[str, Any], ledger: Ledger, gpu: str | None) -> Rates:
    """The rates of the plan's trainings; `gpu` is the GPUs' name, where it is known."""
    groups = (seed_resources(plan), expert_resources(plan))
    kinds = {how.gpus_per_worker > 0 for how in groups}
    block_tokens = plan.training.block_tokens

    def of(trains: Trains) -> dict[bool, Rate]:
        flops = {
            part.part: _flops(model, part, block_tokens) for part in (ALL, trains_of(plan.branching, model))
        }
        return {on_gpus: _rate(plan, flops, trains.part, ledger, on_gpus, gpu) for on_gpus in kinds}

    return Rates(of(ALL), of(trains_of(plan.branching, model)))


def _flops(model: Mapping[str, Any], trains: Trains, block_tokens: int) -> int:
    trained, frozen = count_trained(model, trains)
    return flops_per_token(model, trained + frozen, block_tokens, trained)


def _rate(
    plan: Plan, flops: Mapping[Part, int], part: Part, ledger: Ledger, on_gpus: bool, gpu: str | None
) -> Rate:
    """The rate of training a part; `flops` are those of training a token, by part."""
    if on_gpus and plan.cluster.tokens_per_gpu_second is not None:
        return Rate(plan.cluster.tokens_per_gpu_second, "by `cluster.tokens_per_gpu_second`")
    if (measured := _measured(ledger, on_gpus, part)) is not None:
        return Rate(measured, "as the newest training in this store went")
    for other in flops:
        if (measured := _measured(ledger, on_gpus, other)) is not None:
            origin = f"by FLOPs, as the newest training of `{other}` in this store went"
            return Rate(measured * flops[other] / flops[part], origin, is_estimate=True)
    if on_gpus:
        return _of_gpu(flops[part], gpu)
    per_second = cpu_flops()
    origin = (
        f"estimated from {CPU_UTILISATION:.0%} of the {per_second / 1e9:,.0f} GFLOP/s that a CPU here multiplies "
        "matrices at"
    )
    return Rate(CPU_UTILISATION * per_second / flops[part], origin, is_estimate=True)


def _of_gpu(flops: int, gpu: str | None) -> Rate:
    peak = None if gpu is None else peak_flops(gpu)
    known = gpu if gpu is not None and peak is not None else None
    assumed = f"an {ASSUMED_GPU}, since {'the peak of ' + gpu if gpu else 'the GPU'} is not known here"
    peak = peak or peak_flops(ASSUMED_GPU)
    assert peak is not None
    origin = f"estimated from {GPU_UTILISATION:.0%} of the {peak / 1e12:,.0f} TFLOP/s of {known or assumed}"
    return Rate(GPU_UTILISATION * peak / flops, origin, is_estimate=True)


def _measured(ledger: Ledger, on_gpus: bool, part: Part) -> float | None:
    """Tokens per second of one device, by the newest training of the store on the same kind and of the same
    part."""
    alike = [
        (model.note, devices)
        for model in ledger.list_artifacts("model")
        if model.note.get("tokens_per_second")
        and model.facts.get("trains", "all") == part
        and (devices := _devices(model.note, model.facts, on_gpus))
    ]
    if not alike:
        return None
    note, devices = max(alike, key=lambda one: str(one[0]["created"]))
    return float(note["tokens_per_second"]) / devices


def _devices(note: Mapping[str, Any], facts: Mapping[str, Any], on_gpus: bool) -> float:
    """GPUs or CPUs of a training; 0 where it was of the other kind."""
    if (note["gpus"] > 0) != on_gpus:
        return 0
    if on_gpus:
        return float(note["gpus"])
    profile = facts["profile"]
    last = profile[-1] if isinstance(profile, list) else profile
    return float(last["workers"] * last["cpus_per_worker"])
