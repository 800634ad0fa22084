"""Runs `btm` and writes a mark to standard error when it is about to import a module.

`python -P -m tests.told_while_importing MODULE ARGUMENT…`
"""

import os
import runpy
import sys
from importlib.abc import MetaPathFinder
from typing import Any

MARK = "<<it is imported now>>"


class Telling(MetaPathFinder):
    """Finds nothing."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == module:
            sys.meta_path.remove(self)
            os.write(2, MARK.encode())


if __name__ == "__main__":
    module, *arguments = sys.argv[1:]
    sys.meta_path.insert(0, Telling())
    sys.argv = ["btm", *arguments]
    runpy.run_module("btm_cluster", run_name="__main__")
