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
from types import FrameType
from typing import Any, NoReturn

from btm_cluster.errors import Stopped

AGAIN_SECONDS = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopped() -> Stopped:
    """A signal ended the command, whichever it was: many store nothing that they could go on from."""
    return Stopped(
        "the command was stopped", remedy="give it again; what the store has by now is not made again"
    )


def end_at_once(*_: object) -> None:
    """Ends the process as it is: another library would swallow an exception that
    is raised while it is imported."""
    # Where progress is shown, its last line ends here and the cursor is seen again.
    clear = b"\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else b""
    os.write(2, clear + f"error: {stopped()}\n".encode())
    os._exit(Stopped.exit_code)


class Interruption(BaseException):
    """A signal that breaks off what is under way, until `handling` makes Stopped of it.

    No `except Exception` on its way takes it for a failure of what it broke off.
    """


def break_off(number: int, frame: FrameType | None) -> None:
    """Handles a signal: raises Interruption, wherever the program is.

    But Python prints and drops what is raised in a `__del__`, which the garbage collector calls at any moment.
    There the signal comes again, a moment later.
    """
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise Interruption


def end_at_signals() -> None:
    """For the start of a program: from now on a signal ends it, wherever
    nothing is at work that saves first."""
    for number in SIGNALS:
        signal.signal(number, end_at_once)


def end_with(exit_code: int) -> NoReturn:
    """Ends a program that is done. Signals are ignored from here on: they would change its exit code alone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(exit_code)


@contextmanager
def handling(handler: Callable[..., Any]) -> Iterator[None]:
    """Gives signals to `handler` meanwhile; in the main thread, which alone hears any.

    Raises:
        Stopped: the handler broke off what was under way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        before = {number: signal.signal(number, handler) for number in SIGNALS}
        try:
            yield
        finally:
            for number, known in before.items():
                signal.signal(number, known)
    except Interruption as exc:
        raise stopped() from exc


@contextmanager
def unwinding() -> Iterator[None]:
    """A signal ends in Stopped meanwhile, so that what is half written is cleaned up."""
    with handling(break_off):
        yield
