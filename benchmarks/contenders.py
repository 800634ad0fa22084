"""Runs commands in turn and says what each took: seconds, CPU time and memory of all its processes."""

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Usage:
    """Time and memory of one run of a command, from start to exit; imports count."""

    seconds: float
    cpu_seconds: float
    """User and system time of the process and its children."""
    peak_bytes: int
    """Resident memory of its largest process, shared pages and mapped files included."""
    peak_anonymous_bytes: int
    """Memory of all its processes without mapped files, read every 50 ms; 0 where there is no /proc."""


def in_turn(
    commands: Mapping[str, Sequence[str]], rounds: int, between: Callable[[str], None] = lambda _: None
) -> dict[str, list[Usage]]:
    """Runs each command once a round, so that a change of the machine's load meets all alike.

    Args:
        between: called with a command's name after each of its runs, to check and remove what it made.
    """
    taken: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            taken[name].append(measure(command))
            between(name)
    return taken


def fastest(runs: Sequence[Usage]) -> Usage:
    """The quickest run with the highest memory of all."""
    best = min(runs, key=lambda run: run.seconds)
    return Usage(
        best.seconds,
        min(run.cpu_seconds for run in runs),
        max(run.peak_bytes for run in runs),
        max(run.peak_anonymous_bytes for run in runs),
    )


def median_seconds(runs: Sequence[Usage]) -> float:
    """The median wall time of runs, in seconds."""
    return statistics.median(run.seconds for run in runs)


def measure(command: Sequence[str]) -> Usage:
    """Runs the command to its end.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryFile() as said:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        with _MemoryMeter(process.pid) as meter:
            # This child's usage, where getrusage has all children's.
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.stderr.buffer.write(said.read())
            raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 2**10
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, meter.peak_bytes)


class _MemoryMeter:
    """Reads the anonymous memory of a process and its children, in a thread, until it is closed."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "_MemoryMeter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes(self._pid))


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and all that come from it."""
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return 0
    return sum(_anonymous(Path(f"/proc/{one}/status")) for one in family)


def _anonymous(status: Path) -> int:
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
