"""The storage port and how a store's name picks its adapter."""

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
    """Refuses a store that is a file or would lie below one."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(
            f"the store {folder} cannot be a folder",
            found=f"{existing}, a file",
            expected="a folder, or a place for one",
            remedy="choose another `store`",
        )
