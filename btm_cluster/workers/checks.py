"""Checks before a run begins: the lines of `btm doctor`, and the judgement on machines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from btm_cluster.workers.machine import Machine

GIGABYTE = 10**9
LEAST_FREE_BYTES = 2 * GIGABYTE


@dataclass(frozen=True)
class Check:
    """One line of `btm doctor`. A `note` is worth knowing, and stops nothing."""

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Needs:
    """The needs of a plan on each machine."""

    cpus: int = 1
    """Threads of one worker."""
    free_bytes: int = LEAST_FREE_BYTES
    """To write the largest model once before it is stored, and to read it."""
    compiles: bool = False
    """Whether models are compiled for a GPU."""
    compiles_on_cpu: bool = False
    """Whether they are for a CPU."""


def judge_machines(machines: Sequence[Machine], needs: Needs) -> list[Check]:
    """A line for each kind of check where all machines pass, and a line for each machine that does not."""
    checks = []
    judges: list[Callable[[Machine, Needs], Check]] = [_judge_disk, _judge_gpu, _judge_threads]
    if needs.compiles_on_cpu:
        judges.append(_judge_compiler)
    if any(machine.cache for machine in machines):
        judges.append(_judge_cache)
    if any(machine.store is not None for machine in machines):
        judges.append(_judge_store)
    for judge in judges:
        found = [judge(machine, needs) for machine in machines]
        bad = [
            Check(f"{check.name} on {machine.host}", check.state, check.found, check.remedy)
            for machine, check in zip(machines, found, strict=True)
            if check.state != "ok"
        ]
        if bad:
            checks += bad
        elif found:
            several = f"{len(machines)} machines; the first: " if len(machines) > 1 else ""
            checks.append(Check(found[0].name, "ok", several + found[0].found))
    return checks


def _judge_disk(machine: Machine, needs: Needs) -> Check:
    for folder, free in machine.free_bytes.items():
        if free < needs.free_bytes:
            return Check(
                "disk",
                "wrong",
                f"{free / GIGABYTE:.1f} GB free in {folder}, {needs.free_bytes / GIGABYTE:.1f} GB needed",
                "free some space there, or set TMPDIR or BTM_CACHE_FOLDER to a larger disk",
            )
    free = min(machine.free_bytes.values())
    return Check("disk", "ok", f"{free / GIGABYTE:.0f} GB free in {', '.join(machine.free_bytes)}")


def _judge_gpu(machine: Machine, needs: Needs) -> Check:
    if not machine.gpus and not machine.claimed_gpus:
        return Check("GPU", "ok", "none; trains on CPU")
    driver = machine.gpus[0] if machine.gpus else "no driver"
    seen = f"{len(machine.gpus)} × {driver}"
    if not machine.gpus:
        found, remedy = (
            f"Ray hands out {machine.claimed_gpus:g} GPU, nvidia-smi finds none",
            "install NVIDIA's driver",
        )
    elif machine.torch_cuda is None:
        found = f"{seen}, and a torch without CUDA"
        remedy = "install torch there from pip's own index, which has it with CUDA; download.pytorch.org/whl/cpu has it without"
    elif machine.torch_gpus == 0:
        found = f"{seen}, too old for torch's CUDA {machine.torch_cuda}, or not given to this process"
        remedy = "update the driver, or install a torch for an older CUDA"
    elif machine.torch_gpus < machine.claimed_gpus:
        found = f"Ray hands out {machine.claimed_gpus:g} GPU, torch can use {machine.torch_gpus}"
        remedy = "start Ray with --num-gpus of what torch can use"
    elif needs.compiles and not machine.has_compiler:
        found = f"{seen}, and no C compiler, which torch.compile needs"
        remedy = "install gcc there, or set `compile: off` in the plan's `cluster`"
    else:
        return Check("GPU", "ok", f"{seen}, torch's CUDA {machine.torch_cuda}")
    return Check("GPU", "wrong", found, remedy)


def _judge_threads(machine: Machine, needs: Needs) -> Check:
    if machine.claimed_cpus > machine.usable_cpus:
        found = f"Ray hands out {machine.claimed_cpus:g} CPU, its processes may use {machine.usable_cpus}"
        return Check(
            "threads", "wrong", found, "start Ray with --num-cpus of what this container or machine may use"
        )
    for name, value in machine.variables.items():
        if value.isdigit() and int(value) < needs.cpus:
            found = f"{name}={value} holds a training of {needs.cpus} threads to {value}"
            return Check(
                "threads", "wrong", found, f"unset {name} before `ray start`: threads follow the plan's CPUs"
            )
    return Check("threads", "ok", f"{machine.usable_cpus} CPU usable, nothing holds threads back")


def _judge_compiler(machine: Machine, _: Needs) -> Check:
    if machine.no_cpu_compiler:
        remedy = "install g++ and Python's headers there, or set `compile: off` in the plan's `cluster`"
        return Check("compiler", "wrong", f"{machine.no_cpu_compiler}, which torch.compile needs", remedy)
    return Check("compiler", "ok", "there, and Python's headers")


def _judge_cache(machine: Machine, _: Needs) -> Check:
    if machine.cache:
        remedy = "mend BTM_CACHE_GIGABYTES (a positive number) or BTM_CACHE_FOLDER (yours) in this machine's environment"
        return Check("cache", "wrong", machine.cache, remedy)
    return Check("cache", "ok", "can be")


def _judge_store(machine: Machine, _: Needs) -> Check:
    if machine.store:
        remedy = (
            "give each node the credentials and the network of the store: its environment, profile or role"
        )
        return Check("store from a node", "wrong", machine.store, remedy)
    return Check("store from a node", "ok", "answers")
