"""Checkouts of this repository, whose code runs beside each other."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tree:
    """A checkout whose code runs."""

    name: str
    folder: Path


@contextmanager
def checked_out(commit: str, scratch: Path) -> Iterator[Path]:
    """A working tree of a commit, for as long as it is entered."""
    folder = scratch / "beside"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def check_code(python: Sequence[str], tree: Tree, folder: Path, environment: Mapping[str, str]) -> None:
    """Ends here where another tree's code would run, as an installed package's might."""
    command = [*python, "-c", "import btm_cluster; print(btm_cluster.__file__)"]
    found = subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    if not Path(found.strip()).is_relative_to(tree.folder):
        sys.exit(f"the code of {tree.name} is in {tree.folder}, and {found.strip()} would run")


def commit_of(folder: Path) -> str:
    """The commit that is checked out there, with + where files differ from it."""
    git = ["git", "-C", str(folder)]
    try:
        said = subprocess.run(
            [*git, "describe", "--always", "--dirty=+"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return said.stdout.strip()
