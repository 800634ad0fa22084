"""Standard output and standard error of a command: what is printed arrives
in whatever encoding the terminal has.

Characters that an encoding lacks are written as ASCII. A full disk or a closed pipe is an error of ours.
Knows no commands.
"""

import codecs
import io
import logging
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from btm_cluster.errors import OutputError

log = logging.getLogger(__name__)
CLOSED_PIPE = 128 + signal.SIGPIPE
"""Exit code where the reader has gone, as in `btm forest log | head`: what a
shell reports of a program that SIGPIPE ended."""
_LIKENESSES = {
    "–": "-",
    "−": "-",
    "─": "-",
    "│": "|",
    "…": "...",
    "×": "x",
    "·": "*",
    "β": "beta",
    "±": "+-",
    "≈": "~",
    "→": "->",
    "²": "2",
}
"""ASCII for the characters of our own tables and sentences.

Other characters, such as those of a name, are written as escapes.
"""
_SPACE = "\0"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def safe_output() -> Iterator["Output"]:
    """While it is entered, no print fails for its characters, and one that cannot
    be written raises OutputError.

    What cannot be written to standard error is dropped: the exit code says what it would.
    """
    _open_all_three()
    before = sys.stdout, sys.stderr
    output = _Results(_in_any_encoding(sys.stdout))
    notes = _Notes(_in_any_encoding(sys.stderr))
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, notes)
    try:
        yield output
    finally:
        notes.flush()
        sys.stdout, sys.stderr = before


def _open_all_three() -> None:
    """Descriptors 0, 1 and 2 lead nowhere if they were closed: a file of ours would
    get the number, and libraries print to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def _in_any_encoding(stream: TextIO | None) -> TextIO:
    if stream is None:  # it was closed when Python started
        return open(os.devnull, "w", encoding="utf-8")
    if isinstance(stream, io.TextIOWrapper):
        # It writes what is left from before, which is reported when it is next written.
        with suppress(OSError):
            stream.reconfigure(errors=_ERRORS)
    return stream


def end_input() -> None:
    """From here on, no question of a library is answered by what is piped in: not
    here, and in no process that is started.

    At a terminal, whoever sits there may answer.
    """
    if sys.stdin is not sys.__stdin__ or (sys.stdin is not None and sys.stdin.isatty()):
        return
    nowhere = os.open(os.devnull, os.O_RDONLY)
    if nowhere != 0:  # it is where standard input was closed
        os.dup2(nowhere, 0)
        os.close(nowhere)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def printable(text: str) -> str:
    """Text of several lines without control characters: names of files and what
    other programs say may have any."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream leads to; None where it leads to none."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrapped(text: str, width: int | None) -> str:
    """Text with its lines broken between words, for so many columns; None: not broken.

    What goes on stands below the words after `found:` and its like. Between backticks nothing breaks: it may be
    a command to copy.
    """
    if width is None:
        return text
    lines = []
    for line in re.sub("`[^`\n]*`", lambda code: code[0].replace(" ", _SPACE), text).splitlines():
        label = re.match(r"\s*(?:\w+:\s{2,})?", line)
        hanging = " " * (label.end() if label and label.end() < width // 2 else 0)
        lines += textwrap.wrap(
            line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines).replace(_SPACE, " ")


class Output:
    """A stream whose failures to write are ours."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as exc:
            raise _not_written(exc) from exc

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as exc:
            raise _not_written(exc) from exc

    def abandon(self) -> None:
        """Lets what is left in the buffer go nowhere: Python would complain of
        it at exit, with a code of its own."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Results(Output):
    """Standard output, which is for results: a command writes them from its own thread.

    Lines of other threads go to the log. They are libraries': Ray prints there when a process of the cluster
    dies, whatever it is told about logs.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._owner:
            return super().write(text)
        for line in filter(None, map(str.strip, text.splitlines())):
            log.info("%s", printable(_COLOURS.sub("", line)))
        return len(text)


class _Notes(Output):
    """A stream that may fail to be written."""

    def write(self, text: str) -> int:
        with suppress(OutputError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OutputError:
            self.abandon()


def _not_written(exc: OSError) -> OutputError:
    remedy = "free some space or print elsewhere; the same command says it again"
    failed = OutputError("standard output cannot be written", found=exc.strerror or str(exc), remedy=remedy)
    if isinstance(exc, BrokenPipeError):
        failed.exit_code = CLOSED_PIPE
    return failed


def _in_ascii(exc: UnicodeError) -> tuple[str, int]:
    if not isinstance(exc, UnicodeEncodeError):
        raise exc
    escape = codecs.lookup_error("backslashreplace")
    written = "".join(
        _LIKENESSES.get(character)
        or str(escape(UnicodeEncodeError(exc.encoding, character, 0, 1, exc.reason))[0])
        for character in exc.object[exc.start : exc.end]
    )
    return written, exc.end


_ERRORS = "btm_cluster.ascii"
codecs.register_error(_ERRORS, _in_ascii)
