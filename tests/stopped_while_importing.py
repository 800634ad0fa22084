"""Runs a program of ours that gets a signal when it is about to import a module.

`python -P -m tests.stopped_while_importing MODULE SIGNAL PROGRAM ARGUMENT…`; the program is `btm`, or a file.
"""

import runpy
import signal
import sys
from importlib.abc import MetaPathFinder
from typing import Any

module, number, program, *arguments = sys.argv[1:]


class Signalling(MetaPathFinder):
    """Finds nothing."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name == module:
            sys.meta_path.remove(self)
            signal.raise_signal(int(number))


sys.meta_path.insert(0, Signalling())
sys.argv = [program, *arguments]
if program == "btm":
    runpy.run_module("btm_cluster", run_name="__main__")
else:
    runpy.run_path(program, run_name="__main__")
