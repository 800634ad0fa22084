"""How many files a process may have open: mapped ones count, and a forest may have a thousand experts."""

import resource

OPEN_FILES = 65_536
"""More than scores and weights of a thousand experts take. A shell often allows 1,024 unless it is asked."""


def allow_open_files() -> None:
    """Lets this process open as many files as the system's own limit allows, up to OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
