"""Whether disk and memory of this machine can hold what trainings write and compute with, before anything is spent.

Only what is needed at least is asked for, so that nothing is refused that could work.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from btm_cluster.driver.capacity import Demand, memory_problem
from btm_cluster.equations.budget import frozen_bytes, stored_bytes, trained_bytes
from btm_cluster.errors import ResourcesError
from btm_cluster.workers.nvidia import gpu_bytes

GIGABYTE = 10**9


def check_disk_of_store(location: str, needed: int) -> None:
    """Refuses to begin where a local store cannot be written to, or has too little space for the models to come.

    Raises:
        ResourcesError: naming what is free and what is needed.
    """
    if "://" in location or not needed:
        return
    existing = _existing(Path(location))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ResourcesError(
            f"the store {location} cannot be written to",
            found=f"no permission to write in {existing}",
            expected="a folder for the models to come",
            remedy="give yourself permission to write there, or name another `store`",
        )
    _check_disk(
        "the disk of the store", Path(location), needed, "free some space there, or name another `store`"
    )


def check_this_machine(demands: Sequence[Demand]) -> None:
    """Refuses trainings that this machine has not the memory or the scratch space for.

    Raises:
        ResourcesError: naming what there is and what is needed.
    """
    for problem in problems_here(demands):
        raise problem


def problems_here(demands: Sequence[Demand]) -> Iterator[ResourcesError]:
    """Shortages of memory and scratch space on this machine for trainings that it runs itself."""
    trained = [demand for demand in demands if demand.parameters]
    memory = _memory()
    of_gpu = gpu_bytes() if any(demand.how.gpus_per_worker for demand in trained) else None
    for demand in trained:
        needed = (
            trained_bytes(demand.parameters, demand.by_muon) + frozen_bytes(demand.frozen)
        ) // demand.how.workers
        if problem := memory_problem(demand, of_gpu):
            yield problem
        there, of = (of_gpu, "a GPU") if demand.how.gpus_per_worker else (memory, "this machine")
        if demand.memory is None and there is not None and needed > there:
            yield ResourcesError(
                f"the memory of {of} is too small to train {demand.label}",
                found=f"{there / GIGABYTE:,.1f} GB",
                expected=f"at least {needed / GIGABYTE:,.1f} GB, for weights, gradients and moments of "
                f"{demand.parameters:,} parameters in float32"
                + (f", and {demand.frozen:,} frozen ones" if demand.frozen else ""),
                remedy="take a smaller `model`, or a machine with more",
            )
        try:
            remedy = "free some space there, or set TMPDIR to a folder on a larger disk"
            needed = stored_bytes(demand.parameters, with_optimizer=True, by_muon=demand.by_muon)
            what, folder = (
                f"the disk on which {demand.label} is written before it is stored",
                tempfile.gettempdir(),
            )
            _check_disk(what, Path(folder), needed, remedy)
        except ResourcesError as exc:
            yield exc


def _check_disk(what: str, folder: Path, needed: int, remedy: str) -> None:
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ResourcesError(
            f"{what} has too little free space",
            found=f"{free / GIGABYTE:,.2f} GB free in {folder}",
            expected=f"at least {needed / GIGABYTE:,.2f} GB for the models to come",
            remedy=remedy,
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _memory() -> int:
    """Bytes of memory of this machine, or of the container that this runs in."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))
