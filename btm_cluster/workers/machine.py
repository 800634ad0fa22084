"""Facts of one machine that can stand in a run's way: CPUs, GPUs, disk,
compilers, and whether it reaches the store.

Knows nothing of Ray: `on_ray/examination.py` sends `inspect_machine` to the nodes. `checks.py` judges what it
finds.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_cluster.driver.capacity import Demand, describe_nodes, fits
from btm_cluster.driver.room import SOME_CLUSTER, Room
from btm_cluster.errors import BtmError, ResourcesError, UserError
from btm_cluster.storage import open_storage
from btm_cluster.storage.node_cache import node_cache
from btm_cluster.workers.disk_and_memory import problems_here
from btm_cluster.workers.nvidia import gpu_bytes, gpu_facts

PROGRAM_SECONDS = 120.0
_THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCH_NUM_THREADS", "OMP_THREAD_LIMIT")


@dataclass(frozen=True)
class Machine:
    """The facts of one machine, as `inspect_machine` found them."""

    host: str
    usable_cpus: int
    free_bytes: dict[str, int]
    """By folder: where files are written before they are stored, and the cache of what was fetched."""
    variables: dict[str, str]
    """Environment variables that would hold torch to fewer threads than it is given."""
    gpus: tuple[str, ...]
    """GPUs as NVIDIA's driver names them, each with the driver's version."""
    torch_cuda: str | None = None
    """The CUDA that torch was built for; looked at where there are GPUs."""
    torch_gpus: int = 0
    """How many of them torch can use."""
    store: str | None = None
    """Why the store cannot be used from here; empty: it can; None: not asked."""
    claimed_cpus: float = 0
    """CPUs that Ray hands out; 0: Ray is not asked."""
    claimed_gpus: float = 0
    cache: str = ""
    """Why the cache of what was fetched cannot be; empty: it can."""
    has_compiler: bool = True
    """For C: what torch.compile makes for a GPU is started by a small program that is built there."""
    no_cpu_compiler: str = ""
    """Tool that torch.compile needs to build code for a CPU and that is missing; empty: none."""
    gpu_bytes: int | None = None
    """Memory of its largest GPU."""


def inspect_machine(store: str | None, claimed_cpus: float = 0, claimed_gpus: float = 0) -> Machine:
    """The facts of the machine that this runs on."""
    folders, cache = [Path(tempfile.gettempdir())], ""
    try:
        cached = node_cache()
        folders.append(cached.folder)
        cached.check()
    except UserError as exc:
        cache = f"{exc.what}: {exc.found}"
    gpus = _gpus()
    torch_cuda, torch_gpus = _torch_sees() if gpus or claimed_gpus else (None, 0)
    return Machine(
        socket.gethostname(),
        usable_cpus(),
        {str(folder): shutil.disk_usage(_existing(folder)).free for folder in folders},
        {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        gpus,
        torch_cuda,
        torch_gpus,
        None if store is None else _store_problem(store),
        claimed_cpus,
        claimed_gpus,
        cache,
        not missing_compiler(on_gpu=True),
        missing_compiler(on_gpu=False),
        gpu_bytes() if gpus else None,
    )


def missing_compiler(on_gpu: bool) -> str:
    """The tool that torch.compile lacks here to build its code: a compiler,
    or Python's headers; empty: nothing."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang") if on_gpu else (os.environ.get("CXX", "g++"),)
    if not any(map(shutil.which, names)):
        return f"no {'C' if on_gpu else 'C++'} compiler ({', '.join(dict.fromkeys(names))})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"no {header}"


def check_compiler(demands: Sequence[Demand]) -> None:
    """Refuses to compile on this machine where it has nothing to compile with.

    Raises:
        ResourcesError: naming what is missing.
    """
    for demand in demands:
        if demand.how.compile and (missing := missing_compiler(demand.how.gpus_per_worker > 0)):
            raise ResourcesError(
                f"the model of {demand.label} cannot be compiled on this machine",
                found=missing,
                expected="a compiler and Python's headers, which torch.compile needs",
                remedy="install them, or set `compile: off` in the plan's `cluster`",
            )


def notes_on_this_machine(demands: Sequence[Demand]) -> list[str]:
    """Why a run without a cluster would be refused on this machine, which may
    not be the one that the plan is for."""
    gpus = _torch_sees()[1] if any(demand.how.gpus_per_worker for demand in demands) and _gpus() else 0
    node = {"CPU": float(usable_cpus()), "GPU": float(gpus)}
    there = (
        "a run refuses that here, and looks at the nodes of a cluster when it joins one, as `btm doctor` does"
    )
    notes = []
    for demand in demands:
        if not fits([node], demand.how):
            asked = ", ".join(filter(None, [demand.description, demand.origin]))
            notes.append(
                f"{demand.label} asks for {asked}, and this machine has {describe_nodes([node])}: {there}"
            )
    notes += [f"{one.what}: {one.found}, and it needs {one.expected}" for one in problems_here(demands)]
    try:
        check_compiler(demands)
    except ResourcesError as exc:
        notes.append(f"{exc.what}: {exc.found}")
    return notes


def room_here(on_gpus: bool) -> Room:
    """The devices of this machine; those of some cluster where GPUs are wanted and it has none."""
    gpus = _gpus() if on_gpus else ()
    if on_gpus and not gpus:
        return SOME_CLUSTER
    memory = gpu_bytes() if gpus else None
    return Room("on this machine", float(len(gpus)), float(usable_cpus()), next(iter(gpus), None), memory)


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and what a container's quota leaves of it."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return usable
    return usable if quota == "max" else max(1, min(usable, int(quota) // int(period)))


def _gpus() -> tuple[str, ...]:
    return tuple(f"{name}, driver {driver}" for name, driver in gpu_facts("name", "driver_version"))


def _torch_sees() -> tuple[str | None, int]:
    """In a process of its own: this one may have been given no GPU, and torch
    would hold memory on those it was."""
    program = "import json, torch; print(json.dumps([torch.version.cuda, torch.cuda.device_count()]))"
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        said = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", program],  # -P: not from the current folder
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None, 0
    cuda, count = json.loads(said)
    return cuda, count


def _store_problem(store: str) -> str:
    try:
        open_storage(store).check()
    except BtmError as exc:
        return exc.found or exc.what
    return ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
