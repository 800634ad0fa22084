"""Programs of ours as real processes, forked from one that has imported what
they need and has not imported Ray.

A driver of its own imports for four seconds of a core. What comes before and what comes after is the same:
its own signals, output, environment and exit code. Ray reads its settings when it is imported, so each
program does that itself.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.imported_by_drivers"])


class ForkedProcess:
    """`python -m MODULE ARGUMENT…` in the repository, as far as it is used here like a subprocess.Popen.

    Standard output and standard error are appended to files, which may be the same.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: dict[str, str], out: Path, err: Path
    ) -> None:
        self._arguments = list(arguments)
        self._process = _FORKSERVER.Process(
            target=_run, args=(module, self._arguments, environment, out, err)
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code once it has ended: a signal's number, negative, where that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._arguments, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL unless it has ended."""
        self.send_signal(signal.SIGKILL)


def run_forked(
    module: str, arguments: Sequence[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end; what it prints goes by way of files in `folder`."""
    out, err = folder / "forked.out", folder / "forked.err"
    for file in (out, err):
        file.write_bytes(b"")
    code = ForkedProcess(module, arguments, environment, out, err).wait()
    return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())


def _run(module: str, arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    sys.path.insert(0, str(REPOSITORY))  # as `python -m` has it
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
