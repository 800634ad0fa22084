"""The storage port and how a store's name picks its adapter."""

from btm_cluster.errors import UserError
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.storage.port import Entry, Storage

__all__ = ["Entry", "Storage", "open_storage"]


def open_storage(location: str) -> Storage:
    """The adapter for a plan's `store`. Touches neither disk nor network: `check` does.

    Raises:
        UserError: for a scheme that no adapter serves, or an s3:// URL that is none.
    """
    scheme, separator, _ = location.partition("://")
    if not separator:
        return LocalFolder(location)
    if scheme == "s3":
        from btm_cluster.storage.object_storage import ObjectStorage

        return ObjectStorage(location)
    raise UserError(
        f"no store can be opened at {location}",
        found=f"scheme {scheme}://",
        expected="a folder, or s3://bucket/prefix",
        remedy="set `store` to one of these",
    )
