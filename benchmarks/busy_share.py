"""How busy a machine is while a run lasts: GPUs by NVML, CPUs by psutil. Knows no plans and no stores.

NVML's `utilization.gpu` is itself a share: that of its sampling period, 1/6 to 1 s by the kind of GPU, in
which at least one kernel ran. It is asked every tenth of a second and averaged over time and over all GPUs
of the machine.
"""

import importlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from subprocess import PIPE
from typing import Any, TypeAlias

import psutil

GPU_SECONDS = 0.1
CPU_SECONDS = 0.5
IDLE = "ray::IDLE"
Readings: TypeAlias = list[tuple[float, float]]
"""Readings of a meter by time, in seconds since the epoch, ascending."""


def mean_between(readings: Readings, begin: float, end: float) -> float | None:
    """Mean over time of what each reading says until the next; None without a reading before `end`."""
    held = [(at, value) for at, value in readings if at < end]
    if not held or end <= begin:
        return None
    total = weight = 0.0
    for (at, value), until in zip(held, [*(at for at, _ in held[1:]), end], strict=True):
        seconds = max(0.0, until - max(at, begin))
        total, weight = total + seconds * value, weight + seconds
    return total / weight if weight else None


def used_between(readings: Readings, begin: float, end: float) -> float:
    """How much a count that only grows grew between two times, in straight lines between its readings."""
    return _at(readings, end) - _at(readings, begin)


def _at(readings: Readings, when: float) -> float:
    before = [(at, value) for at, value in readings if at <= when]
    after = [(at, value) for at, value in readings if at > when]
    if not before or not after:
        return before[-1][1] if before else 0.0
    (t0, v0), (t1, v1) = before[-1], after[0]
    return v0 + (v1 - v0) * (when - t0) / (t1 - t0)


class GpuMeter:
    """Reads how busy the machine's GPUs are, in a thread, until it is closed."""

    def __init__(self, method: str, read: Callable[[], Generator[float, None, None]]) -> None:
        self.method = method
        self.readings: Readings = []
        self._read = read
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "GpuMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        with closing(self._read()) as shares:
            for share in shares:
                self.readings.append((time.time(), share))
                if self._ended.is_set():
                    return


def gpu_meter() -> GpuMeter | None:
    """Reads by NVML's Python package, or else by `nvidia-smi`; None without either, or without a GPU."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return _smi_meter()
    try:
        pynvml.nvmlInit()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None

    def read() -> Generator[float, None, None]:
        with suppress(pynvml.NVMLError):
            while True:
                yield sum(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in gpus) / len(gpus) / 100
                time.sleep(GPU_SECONDS)

    return GpuMeter(_method("pynvml", len(gpus)), read) if gpus else None


def _smi_meter() -> GpuMeter | None:
    if shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True)
    count = len(listed.stdout.splitlines())
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def read() -> Generator[float, None, None]:
        with subprocess.Popen(
            [*command, f"--loop-ms={GPU_SECONDS * 1000:.0f}"], stdout=PIPE, text=True
        ) as child:
            assert child.stdout is not None
            try:
                with suppress(ValueError):  # nothing, as it has ended, or [N/A]
                    while True:
                        yield sum(float(child.stdout.readline()) for _ in range(count)) / count / 100
            finally:
                child.terminate()

    return GpuMeter(_method("nvidia-smi", count), read) if count and not listed.returncode else None


def _method(by: str, gpus: int) -> str:
    return (
        f"NVML's utilization.gpu by {by}, asked every {GPU_SECONDS} s, mean over time and {gpus} GPU(s): "
        "the share of NVML's own sampling period (1/6 to 1 s) in which a kernel ran"
    )


@dataclass(frozen=True)
class Process:
    """A process of the run as it was last seen; times in seconds since the epoch.

    A worker of Ray has the names of all that ran in it.
    """

    name: str
    began: float
    seen: float
    cpu_seconds: float


def joined(names: str, name: str) -> str:
    """The names that a process had before, and the one that it has now."""
    seen = dict.fromkeys([*names.split(", "), name.partition(".")[0]])  # of an actor's method, the actor
    tasks = [one for one in seen if one.startswith("ray::") and one != IDLE]
    return ", ".join(tasks) or name


class CpuMeter:
    """Adds up the CPU time of a process and all that come from it, in a thread, until it is closed.

    What a process uses after it was last seen, at most half a second before its end, is missed.
    """

    method = (
        f"CPU time of all processes of the run by psutil, read every {CPU_SECONDS} s, over that of all cores"
    )

    def __init__(self, process: int) -> None:
        self.readings: Readings = []
        self._process = process
        self._seen: dict[tuple[int, float], Process] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "CpuMeter":
        self._machine = _machine_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._machine = _machine_seconds() - self._machine

    @property
    def processes(self) -> list[Process]:
        """Those that were seen, in the order of their starts."""
        return sorted(self._seen.values(), key=lambda process: process.began)

    @property
    def seconds_of_others(self) -> float:
        """CPU time of all processes of the machine that are not the run's."""
        return max(0.0, self._machine - sum(process.cpu_seconds for process in self._seen.values()))

    def share(self, begin: float, end: float) -> float:
        """Share of the time of all cores."""
        return used_between(self.readings, begin, end) / ((end - begin) * (psutil.cpu_count() or 1))

    def _poll(self) -> None:
        while True:
            self._look()
            if self._ended.wait(CPU_SECONDS):
                return

    def _look(self) -> None:
        try:
            top = psutil.Process(self._process)
            alive = [top, *top.children(recursive=True)]
        except psutil.Error:
            return
        for one in alive:
            try:
                with one.oneshot():
                    times, began, name = one.cpu_times(), one.create_time(), one.name()
            except psutil.Error:
                continue
            before = self._seen.get((one.pid, began))
            if before is not None:
                name = joined(before.name, name)
            self._seen[one.pid, began] = Process(name, began, time.time(), times.user + times.system)
        self.readings.append((time.time(), sum(process.cpu_seconds for process in self._seen.values())))


def _machine_seconds() -> float:
    """CPU time that all processes of the machine have used since it started."""
    times: Any = psutil.cpu_times()
    return float(times.user + times.system + times.nice)  # user has the guests' already
