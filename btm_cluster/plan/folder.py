"""Relative paths of a plan: where they begin, and how the processes of a run find them.

A plan keeps its texts' paths as they are written, since identities hang on them; they are opened below its folder.
"""

import os
from pathlib import Path

JOBS_COPY = "/working_dir_files/_ray_pkg_"
"""In paths of what `ray job submit --working-dir` carried."""


def is_in_jobs_copy(path: str) -> bool:
    """Whether it lies in the copy of a working directory that each node unpacks for a job."""
    return JOBS_COPY in path


def opened_folder(folder: Path | str) -> str:
    """A folder by a name that every process of a run can open.

    Absolute, since workers run in folders of their own; but from the current folder where both are in a job's
    copy, in which the workers of every node begin. Empty: the current folder itself.
    """
    real, here = os.path.realpath(folder), os.getcwd()
    if is_in_jobs_copy(here) and f"{real}/".startswith(f"{here}/"):
        return real[len(here) + 1 :]
    return real


def is_relative(path: str) -> bool:
    """Whether where a path leads hangs on the folder that it begins at."""
    return not ("://" in path or path.startswith(("/", "~")))


def located(folder: str, path: str) -> str:
    """A plan's path from the folder of the plan, as `opened_folder` has it."""
    return below(folder, path) if is_relative(path) else path


def below(folder: str, path: str) -> str:
    """A relative path from a folder; of a whole one, `..` leads to the folder above."""
    parts = path.split("/")
    while parts and parts[0] in (".", "..") and folder.startswith("/"):  # further on, `..` may follow a link
        folder = os.path.dirname(folder) if parts.pop(0) == ".." else folder
    return os.path.join(folder, *parts)
