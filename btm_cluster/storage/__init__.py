"""The storage port and how a store's name picks its adapter."""

import os
from pathlib import Path

from btm_cluster.errors import UserError
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.storage.port import Entry, Storage

__all__ = ["Entry", "Storage", "open_storage"]


def open_storage(location: str) -> Storage:
    """The adapter for a plan's `store`.

    Raises:
        UserError: for a scheme that no adapter serves.
    """
    scheme, separator, _ = location.partition("://")
    if not separator:
        _check_folder(Path(location).expanduser().absolute())
        return LocalFolder(location)
    raise UserError(
        f"no store can be opened at {location}",
        found=f"scheme {scheme}://",
        expected="a folder",
        remedy="set `store` to the path of a folder",
    )


def _check_folder(folder: Path) -> None:
    """Refuses a store that is a file, would lie below one, or has a name that no folder can have."""
    found = ""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        found = f"{existing}, which is no folder"
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # not there yet, or named above
    except OSError as exc:
        found = found or str(exc)[:200]
    if found:
        raise UserError(
            f"the store {str(folder)[:200]} cannot be a folder",
            found=found,
            expected="a folder, or a place for one",
            remedy="choose another `store`",
        )
