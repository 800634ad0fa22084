"""Whose account this process runs under."""

import getpass
import os


def account() -> str:
    """Its name; its number where it has none, as in a container that runs under any number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the one until Python 3.12, the other since
        return str(os.getuid())
