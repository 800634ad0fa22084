"""Where torch.compile keeps the code that it makes, for the next process on this machine."""

import os

from btm_cluster.storage.node_cache import node_cache


def keep_compiled_code() -> None:
    """Has this process keep compiled code in the node's cache, unless the environment names another folder."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(node_cache().folder_for_code()))
