"""Hashes of large files, remembered for as long as a file stays as it is."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from btm_cluster.storage import file_hashes
from btm_cluster.storage.file_hashes import FoundFile, sha256_of
from btm_cluster.storage.node_cache import node_cache


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and as long unchanged, beside a cache of its own."""
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SMALL_BYTES", 0)
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", -60.0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were read, in order."""
    names: list[str] = []
    hash_file = file_hashes._hash

    def noted(file: Path) -> bytes:
        names.append(file.name)
        return hash_file(file)

    monkeypatch.setattr(file_hashes, "_hash", noted)
    return names


def test_a_large_file_is_read_once(weights: Path, read: list[str]) -> None:
    found = [sha256_of(weights) for _ in range(3)]
    assert found == [hashlib.sha256(b"weights").digest()] * 3
    assert read == [weights.name]


def test_a_file_that_was_changed_just_before_is_read_again(
    weights: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may fall into the same step of the file system's clock."""
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", 60.0)
    assert [sha256_of(weights) for _ in range(2)] == [hashlib.sha256(b"weights").digest()] * 2
    assert read == [weights.name] * 2


def test_a_full_disk_costs_the_cache_nothing_and_the_file_is_read_once(
    weights: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = node_cache().get("kept", lambda path: path.write_bytes(b"model") and None)
    for file in (kept, node_cache().folder / "used" / "kept"):
        if file.exists():
            os.utime(file, (1, 1))  # nobody has it in use

    def full(path: Path, data: bytes) -> int:  # noqa: ARG001
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert sha256_of(weights) == hashlib.sha256(b"weights").digest()
    assert read == [weights.name]
    assert kept.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(weights: Path) -> None:
    found = FoundFile(weights)
    weights.write_bytes(b"another")
    found.remember("sha256", hashlib.sha256(b"weights").digest())
    assert not found.is_same()
    assert found.recall("sha256") is None
    assert sha256_of(weights) == hashlib.sha256(b"another").digest()
    weights.unlink()
    found.remember("sha256", b"")
    assert not found.is_same()


def test_what_is_remembered_is_of_one_kind(weights: Path) -> None:
    FoundFile(weights).remember("chunks", b"theirs")
    assert FoundFile(weights).recall("chunks") == b"theirs"
    assert FoundFile(weights).recall("sha256") is None


def test_a_small_file_leaves_nothing(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "SMALL_BYTES", 100)
    assert sha256_of(weights) == hashlib.sha256(b"weights").digest()
    assert not (tmp_path / "cache").exists()


def test_a_change_that_keeps_size_and_time_is_seen(weights: Path) -> None:
    sha256_of(weights)
    before = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert sha256_of(weights) == hashlib.sha256(b"WEIGHTS").digest()


def test_another_file_in_its_place_is_seen(weights: Path, tmp_path: Path) -> None:
    sha256_of(weights)
    other = tmp_path / "other"
    other.write_bytes(b"another")
    os.replace(other, weights)
    assert sha256_of(weights) == hashlib.sha256(b"another").digest()


def test_what_is_remembered_but_damaged_is_not_believed(weights: Path, tmp_path: Path) -> None:
    sha256_of(weights)
    (kept,) = (tmp_path / "cache" / "files").glob("sha256-*")
    kept.write_bytes(b"cut")
    assert sha256_of(weights) == hashlib.sha256(b"weights").digest()


def test_without_a_cache_the_file_is_read(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTM_CACHE_FOLDER", "/proc/none")
    assert sha256_of(weights) == hashlib.sha256(b"weights").digest()
    monkeypatch.setenv("BTM_CACHE_GIGABYTES", "many")
    assert sha256_of(weights) == hashlib.sha256(b"weights").digest()


def test_a_file_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")
