"""A step's own folder on this machine's disk, for the files that it is about to store. Gone when the step is done."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btm_cluster.errors import StoreError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below the temporary one.

    Raises:
        StoreError: its disk is full; what was stored before stays.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"the disk below {tempfile.gettempdir()} is full, where a step keeps what it is about to store",
            found=str(exc),
            remedy="free some disk space there, or set TMPDIR to a larger disk; the same command goes on",
        ) from exc
