"""`btm`, and `python -m btm_cluster`: signals are heard before anything is imported that takes long."""

import os
import sys
from pathlib import Path

_HERE = Path(__file__).parents[1]
if (
    __name__ == "__main__"
    and not sys.flags.safe_path
    and os.path.realpath(sys.path[0]) != os.path.realpath(_HERE)
):
    # `-m` puts the current folder first, where a module of the user's own may hide a library; a checkout is
    # found by it.
    del sys.path[0]

from btm_cluster.stopping import end_at_signals  # noqa: E402 (found by the path that is now right)


def main() -> None:
    """Runs the command line."""
    end_at_signals()
    from btm_cluster.cli import main

    main()


if __name__ == "__main__":
    main()
