"""What can be wrong before a run begins: facts about one machine, gathered there, and judged here.

Knows nothing of Ray: `on_ray/examination.py` sends `look_around` to the nodes, `doctor.py` puts everything together.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from btm_cluster.errors import BtmError, ResourcesError, UserError
from btm_cluster.room import Ask, fits, nodes_words
from btm_cluster.storage import open_storage
from btm_cluster.storage.node_cache import node_cache

GIGABYTE = 10**9
LEAST_FREE_BYTES = 2 * GIGABYTE
PROGRAM_SECONDS = 120.0
_THREAD_VARIABLES = ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCH_NUM_THREADS", "OMP_THREAD_LIMIT")


@dataclass(frozen=True)
class Check:
    """One line of `btm doctor`. A `note` is worth knowing, and stops nothing."""

    name: str
    state: Literal["ok", "note", "wrong"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Needs:
    """What a plan asks of each machine."""

    cpus: int = 1
    """Threads of one worker."""
    free_bytes: int = LEAST_FREE_BYTES
    """To write the largest model once before it is stored, and to read it."""
    compiles: bool = False
    """Whether models are compiled for a GPU."""
    compiles_on_cpu: bool = False
    """Whether they are for a CPU."""


@dataclass(frozen=True)
class Machine:
    """What `look_around` found on one machine."""

    host: str
    usable_cpus: int
    free_bytes: dict[str, int]
    """By folder: where files are written before they are stored, and the cache of what was fetched."""
    variables: dict[str, str]
    """Of the environment: those that would hold torch to fewer threads than it is given."""
    gpus: tuple[str, ...]
    """What the driver names, each with the driver's version."""
    torch_cuda: str | None = None
    """The CUDA that torch was built for; looked at where there are GPUs."""
    torch_gpus: int = 0
    """How many of them torch can use."""
    store: str | None = None
    """Why the store cannot be used from here; empty: it can; None: not asked."""
    claimed_cpus: float = 0
    """What Ray hands out of it; 0: Ray is not asked."""
    claimed_gpus: float = 0
    cache: str = ""
    """Why the cache of what was fetched cannot be; empty: it can."""
    has_compiler: bool = True
    """For C: what torch.compile makes for a GPU is started by a small program that is built there."""
    no_cpu_compiler: str = ""
    """Tool that torch.compile needs to build code for a CPU and that is missing; empty: none."""


def look_around(store: str | None, claimed_cpus: float = 0, claimed_gpus: float = 0) -> Machine:
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
        None if store is None else _complaint(store),
        claimed_cpus,
        claimed_gpus,
        cache,
        not missing_compiler(on_gpu=True),
        missing_compiler(on_gpu=False),
    )


def missing_compiler(on_gpu: bool) -> str:
    """The tool that torch.compile lacks here to build its code: a compiler, or Python's headers; empty: nothing."""
    names = (os.environ.get("CC", "cc"), "gcc", "clang") if on_gpu else (os.environ.get("CXX", "g++"),)
    if not any(map(shutil.which, names)):
        return f"no {'C' if on_gpu else 'C++'} compiler ({', '.join(dict.fromkeys(names))})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"no {header}"


def check_compiler(asks: Sequence[Ask]) -> None:
    """Refuses to compile on this machine where it has nothing to compile with.

    Raises:
        ResourcesError: naming what is missing.
    """
    for ask in asks:
        if ask.how.compile and (missing := missing_compiler(ask.how.gpus_per_worker > 0)):
            raise ResourcesError(
                f"the model of {ask.label} cannot be compiled on this machine",
                found=missing,
                expected="a compiler and Python's headers, which torch.compile wants",
                remedy="install them, or set `compile: off` in the plan's `cluster`",
            )


def notes_on_this_machine(asks: Sequence[Ask]) -> list[str]:
    """Why a run without a cluster would be refused on this machine, which may not be the one that the plan is for."""
    gpus = _torch_sees()[1] if any(ask.how.gpus_per_worker for ask in asks) and _gpus() else 0
    node = {"CPU": float(usable_cpus()), "GPU": float(gpus)}
    there = "a run refuses that here, and looks at the nodes of a cluster when it joins one, as `btm doctor` does"
    notes = []
    for ask in asks:
        if not fits([node], ask.how):
            asked = ", ".join(filter(None, [ask.words, ask.origin]))
            notes.append(f"{ask.label} asks for {asked}, and this machine has {nodes_words([node])}: {there}")
    try:
        check_compiler(asks)
    except ResourcesError as exc:
        notes.append(f"{exc.what}: {exc.found}")
    return notes


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
        found, remedy = f"Ray hands out {machine.claimed_gpus:g} GPU, nvidia-smi finds none", "install NVIDIA's driver"
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
        found = f"{seen}, and no C compiler, which torch.compile wants"
        remedy = "install gcc there, or set `compile: off` in the plan's `cluster`"
    else:
        return Check("GPU", "ok", f"{seen}, torch's CUDA {machine.torch_cuda}")
    return Check("GPU", "wrong", found, remedy)


def _judge_threads(machine: Machine, needs: Needs) -> Check:
    if machine.claimed_cpus > machine.usable_cpus:
        found = f"Ray hands out {machine.claimed_cpus:g} CPU, its processes may use {machine.usable_cpus}"
        return Check("threads", "wrong", found, "start Ray with --num-cpus of what this container or machine may use")
    for name, value in machine.variables.items():
        if value.isdigit() and int(value) < needs.cpus:
            found = f"{name}={value} holds a training of {needs.cpus} threads to {value}"
            return Check("threads", "wrong", found, f"unset {name} before `ray start`: threads follow the plan's CPUs")
    return Check("threads", "ok", f"{machine.usable_cpus} CPU usable, nothing holds threads back")


def _judge_compiler(machine: Machine, _: Needs) -> Check:
    if machine.no_cpu_compiler:
        remedy = "install g++ and Python's headers there, or set `compile: off` in the plan's `cluster`"
        return Check("compiler", "wrong", f"{machine.no_cpu_compiler}, which torch.compile wants", remedy)
    return Check("compiler", "ok", "there, and Python's headers")


def _judge_cache(machine: Machine, _: Needs) -> Check:
    if machine.cache:
        remedy = (
            "mend BTM_CACHE_GIGABYTES (a positive number) or BTM_CACHE_FOLDER (yours) in this machine's environment"
        )
        return Check("cache", "wrong", machine.cache, remedy)
    return Check("cache", "ok", "can be")


def _judge_store(machine: Machine, _: Needs) -> Check:
    if machine.store:
        remedy = "give each node the credentials and the network of the store: its environment, profile or role"
        return Check("store from a node", "wrong", machine.store, remedy)
    return Check("store from a node", "ok", "answers")


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and what a container's quota leaves of it."""
    usable = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return usable
    return usable if quota == "max" else max(1, min(usable, int(quota) // int(period)))


def _gpus() -> tuple[str, ...]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            query,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROGRAM_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip().replace(", ", ", driver ") for line in said.splitlines() if line.strip())


def _torch_sees() -> tuple[str | None, int]:
    """In a process of its own: this one may have been given no GPU, and torch would hold memory on those it was."""
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


def _complaint(store: str) -> str:
    try:
        open_storage(store).check()
    except BtmError as exc:
        return exc.found or exc.what
    return ""


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
