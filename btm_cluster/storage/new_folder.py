"""Folders that a command writes on this machine: whether that can be, tried
before anything is spent, and how it is done."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btm_cluster.errors import UserError


def check_new_folder(to: Path) -> None:
    """Refuses a place where no new folder can be made.

    Raises:
        UserError: something is there already, or nothing can be written there.
    """
    if os.path.lexists(to):
        raise UserError(f"{to} already exists", remedy="choose another folder")
    check_folder(to)


def check_folder(to: Path) -> None:
    """Refuses a place where a folder can neither be made nor, if it is there, be written to.

    Leaves nothing behind.

    Raises:
        UserError: saying why.
    """
    try:
        existing = next(path for path in (to.absolute(), *to.absolute().parents) if path.exists())
        # Tried, since permissions do not tell of a read-only or a made-up file system.
        with tempfile.TemporaryDirectory(dir=existing, prefix=".btm-") as scratch:
            Path(scratch, to.name).mkdir(exist_ok=True)
    except NotADirectoryError as exc:
        raise UserError(
            f"{to} cannot be a folder", found=f"{existing}, a file", remedy="choose another folder"
        ) from exc
    except OSError as exc:
        raise UserError(f"cannot write to {to}", found=str(exc), remedy="choose another folder") from exc


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `to` once all is written."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        folder = Path(scratch, to.name)
        folder.mkdir()
        yield folder
        folder.rename(to)
