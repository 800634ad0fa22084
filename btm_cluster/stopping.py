"""How a process of ours ends when it is asked to, by SIGTERM or Ctrl-C: with
exit code 130 and one line, at any moment.

Imports nothing that takes long, since a signal may come while the rest is imported.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from btm_cluster.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopped() -> Stopped:
    """The run was stopped, by a signal."""
    return Stopped("the run was stopped", remedy="the same command goes on from here")


def end_at_once(*_: object) -> None:
    """Ends the process as it is: another library would swallow an exception that
    is raised while it is imported."""
    # Where progress is shown, its last line ends here and the cursor is seen again.
    clear = b"\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else b""
    os.write(2, clear + f"error: {stopped()}\n".encode())
    os._exit(Stopped.exit_code)


def end_at_signals() -> None:
    """For the start of a program: from now on a signal ends it, wherever
    nothing is at work that saves first."""
    for number in SIGNALS:
        signal.signal(number, end_at_once)


@contextmanager
def handling(handler: Callable[..., Any]) -> Iterator[None]:
    """Gives signals to `handler` meanwhile; in the main thread, which alone hears any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


@contextmanager
def unwinding() -> Iterator[None]:
    """A signal raises Stopped meanwhile, so that what is half written is cleaned up."""

    def unwind(*_: object) -> None:
        raise stopped()

    with handling(unwind):
        yield
