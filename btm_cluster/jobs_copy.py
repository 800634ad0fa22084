"""A Ray job's copy of its working directory, told by its path.

Each node unpacks one of its own, in which the job's driver and workers begin, and which goes with the job.
"""

import re

_COPY = re.compile(r"(.*?/runtime_resources/working_dir_files/[^/]+)(?:/.*)?", re.DOTALL)


def jobs_copy_of(path: str) -> str | None:
    """The root of the job's copy that an absolute path lies in; None where it lies in none."""
    found = _COPY.fullmatch(path)
    return found[1] if found else None
