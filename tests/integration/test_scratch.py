"""Folders for what is about to be stored: gone when their owner is done, or was
killed; never taken from one that lives."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from btm_cluster.storage.scratch import scratch_folder

OWNER = """
import os, sys
from btm_cluster.storage.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "weights").write_bytes(b"half of them")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, for processes that it starts too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def let_be_old(folder: Path) -> None:
    os.utime(folder, (time.time() - 3600,) * 2)


def test_a_folder_is_there_while_it_is_used_and_gone_afterwards(temporary: Path) -> None:
    with scratch_folder() as first, scratch_folder() as second:
        let_be_old(first)
        (second / "file").write_bytes(b"x")
        with scratch_folder():
            assert first.is_dir(), "its owner is this very process"
            assert (second / "file").exists()
        assert list(first.iterdir()) == []
        assert str(os.getpid()) in first.name
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_that_of_a_living_one_is_not(
    temporary: Path,
) -> None:
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        folders = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout]
        for folder in folders:
            let_be_old(folder)
        with scratch_folder():
            assert all((folder / "weights").exists() for folder in folders)
        owners[0].send_signal(signal.SIGKILL)
        owners[0].wait()
        with scratch_folder() as own:
            assert {*temporary.iterdir()} == {folders[1], own}
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()


def test_what_is_young_anothers_or_a_link_is_left_alone(temporary: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    elsewhere = tmp_path / "of somebody"
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"kept")
    names = ["young", "link", "file"]
    young, link, file = (temporary / f"btm-scratch-{host}-{2**22}-{name}" for name in names)
    other = temporary / f"btm-scratch-another.{host}-{2**22}-old"
    young.mkdir()
    other.mkdir()
    link.symlink_to(elsewhere)
    file.write_bytes(b"x")
    for path in (elsewhere, other):
        let_be_old(path)
    with scratch_folder():
        pass
    assert {young, link, file, other, elsewhere} == {*temporary.iterdir()}
    assert (elsewhere / "file").exists()
