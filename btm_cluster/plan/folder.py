"""Paths of a plan: where relative ones begin, how the processes of a run find them, and which of them lie in a
Ray job's copy of its working directory.

A plan keeps its texts' paths as they are written, since identities hang on them; they are opened below its folder.
"""

import os
import re
from pathlib import Path

from btm_cluster.errors import UserError

_JOBS_COPY = re.compile(r"(.*?/runtime_resources/working_dir_files/[^/]+)(?:/.*)?", re.DOTALL)


def jobs_copy_of(path: str) -> str | None:
    """The root of a Ray job's copy of its working directory that an absolute path lies in; None in none.

    Each node unpacks one of its own, in which the job's driver and workers begin, and which goes with the job.
    """
    found = _JOBS_COPY.fullmatch(path)
    return found[1] if found else None


def refuse_in_jobs_copy(location: str) -> None:
    """Refuses a location for results, an absolute path or address, that would go with a job.

    Raises:
        UserError: it lies in the job's copy of its working directory.
    """
    if jobs_copy_of(location) is not None:
        raise UserError(
            "what is written would be deleted with this job",
            found=f"{location}, in the Ray job's own copy of its working directory",
            expected="a bucket, or the absolute path of a folder that all nodes share",
            remedy="name one of these",
        )


def opened_folder(folder: Path | str) -> str:
    """A folder by a name that every process of a run can open.

    Absolute, since workers run in folders of their own; but in a job's copy from its root, in which the workers
    of every node begin. Empty: the current folder itself.

    Raises:
        UserError: it lies in a job's copy, and the current folder is not the root of that.
    """
    real, here = os.path.realpath(folder), os.getcwd()
    root = jobs_copy_of(real)
    if root is None:
        return real
    if here != root:
        raise UserError(
            f"the nodes of the cluster would not find the paths of the plan in {real}",
            found=f"the current folder {here}",
            expected=f"{root}, this Ray job's copy of its working directory, as workers begin in the root of theirs",
            remedy="start the job's command there, without `cd`, and name the plan from there, as in `btm run "
            "plans/plan.yaml`",
        )
    return os.path.relpath(real, root) if real != root else ""


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
