"""The storage port and how a store's name picks its adapter."""

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
        return LocalFolder(location)
    raise UserError(f"no store can be opened at {location}", found=f"scheme {scheme}://", expected="a folder")
