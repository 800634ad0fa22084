"""The log of a command: on standard error, and in a file where one is named.

A process that uses this package as a library decides that by itself. Knows no commands.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from btm_cluster.errors import UserError
from btm_cluster.terminal.output import printable

OURS = "btm_cluster"
_TIMES = "%(asctime)s %(levelname)s %(message)s"
_NAMED = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_SECONDS = "%Y-%m-%d %H:%M:%S"
_console_level = logging.NOTSET
"""The least that the command which runs shows of our own records."""


def is_quiet() -> bool:
    """Whether results and errors alone are wanted."""
    return _console_level >= logging.ERROR


def is_live(stream: Any) -> bool:
    """Whether lines can be replaced there: a terminal that is not `TERM=dumb`."""
    return bool(stream.isatty()) and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@contextmanager
def logging_to(quiet: bool = False, verbose: bool = False, log_file: Path | None = None) -> Iterator[None]:
    """Log records of a command: our own from INFO on, of other libraries warnings.

    At a terminal a live display stands for what is below a warning. `verbose` shows our own DEBUG records,
    `quiet` errors alone. The file gets our own from DEBUG on, and others from INFO on: below it, some
    libraries log what they sign requests by.

    Raises:
        UserError: the two exclude each other, or the file cannot be written.
    """
    global _console_level
    if quiet and verbose:
        raise UserError("--quiet and --verbose exclude each other", remedy="leave out one of them")
    usual = logging.WARNING if is_live(sys.stderr) else logging.INFO
    before = _console_level
    _console_level = logging.ERROR if quiet else logging.DEBUG if verbose else usual
    others = max(_console_level, logging.WARNING)
    with ExitStack() as stack:
        handlers = [_handler(_ToStandardError(), _console_level, others)]
        if log_file is not None:
            handlers.append(_handler(_opened(log_file), logging.DEBUG, logging.INFO))
        for handler in handlers:
            stack.enter_context(_added(logging.getLogger(), handler))
        stack.enter_context(_at_level(logging.getLogger(), logging.INFO if log_file else others))
        stack.enter_context(_at_level(logging.getLogger(OURS), logging.DEBUG if log_file else _console_level))
        try:
            yield
        finally:
            _console_level = before


@contextmanager
def logging_of_library() -> Iterator[None]:
    """Shows our own records on standard error, where the program that uses this package has set up nothing."""
    ours = logging.getLogger(OURS)
    if ours.hasHandlers():
        yield
        return
    level = logging.WARNING if sys.stderr is sys.__stderr__ and is_live(sys.stderr) else logging.INFO
    with _added(ours, _handler(_ToStandardError(), level, level)), _at_level(ours, level):
        yield


class _ToStandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at the moment: a live display takes its place for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(
            _Printable("%(levelname)s %(message)s" if is_live(sys.stderr) else _TIMES, _SECONDS)
        )

    @property
    def stream(self) -> Any:
        return sys.stderr


class _File(logging.FileHandler):
    """A file that is given up where it cannot be written any more."""

    def close(self) -> None:
        with suppress(OSError):  # of what was not written
            super().close()

    def handleError(self, _: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger(OURS).warning(
            "%s cannot be written any more, and is given up: %s", self.baseFilename, sys.exception()
        )


class _Printable(logging.Formatter):
    """Without control characters: names of files and what other programs say may have any."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _opened(path: Path) -> logging.Handler:
    try:
        handler = _File(path, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise UserError(
            f"--log-file {path} cannot be written",
            found=exc.strerror or str(exc),
            remedy="name a file in a folder that is there and can be written",
        ) from exc
    handler.setFormatter(logging.Formatter(_NAMED, _SECONDS))
    return handler


def _handler(handler: logging.Handler, ours: int, others: int) -> logging.Handler:
    """The handler, for our own records from one level on, and for others from another."""

    def is_wanted(record: logging.LogRecord) -> bool:
        is_ours = record.name == OURS or record.name.startswith(f"{OURS}.")
        return record.levelno >= (ours if is_ours else others)

    handler.addFilter(is_wanted)
    return handler


@contextmanager
def _added(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _at_level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
