"""Large files of artifacts that this node has read before: hashed once for as long as they stay as they are."""

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.ledger import artifact as artifacts
from btm_cluster.ledger.artifact import CHUNK_BYTES
from btm_cluster.operations.verify import verify
from btm_cluster.storage import file_hashes, scratch
from tests.made import origin

SIZE = 2 * CHUNK_BYTES + 1000
Read = Callable[[Ledger, Artifact], bytes]


class Hashed:
    """Counts the bytes that are hashed in pieces of a large file, not those of manifests."""

    def __init__(self) -> None:
        self.bytes = 0

    def note(self, data: Any) -> None:
        if len(data) >= 1000:
            self.bytes += len(data)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Hashed:
    noted, sha256 = Hashed(), hashlib.sha256

    class Noting:
        def __init__(self, data: Any = b"") -> None:
            noted.note(data)
            self._digest = sha256(data)

        def update(self, data: Any) -> None:
            noted.note(data)
            self._digest.update(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._digest, name)

    monkeypatch.setattr("hashlib.sha256", Noting)
    return noted


@pytest.fixture(params=["folder", "bucket"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The ledger of a store, on a node where files of a MiB are large and nothing was changed just before."""
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "SMALL_BYTES", 2**20)
    monkeypatch.setattr(file_hashes, "SETTLED_SECONDS", -60.0)
    in_folder = request.param == "folder"
    return Ledger.open(str(tmp_path / "store") if in_folder else request.getfixturevalue("pretended_bucket"))


only_in_a_folder = pytest.mark.parametrize("ledger", ["folder"], indirect=True)
only_in_a_bucket = pytest.mark.parametrize("ledger", ["bucket"], indirect=True)


@pytest.fixture
def artifact(ledger: Ledger, tmp_path: Path) -> Artifact:
    (tmp_path / "weights").write_bytes(os.urandom(1000) * (SIZE // 1000 + 1))
    os.truncate(tmp_path / "weights", SIZE)
    return ledger.commit(origin("model", {}), {"weights": tmp_path / "weights"}, {})


def by_opening(ledger: Ledger, artifact: Artifact) -> bytes:
    return ledger.open_file(artifact, "weights").read_bytes()


def by_streaming(ledger: Ledger, artifact: Artifact) -> bytes:
    with ThreadPoolExecutor(2) as pool:
        return b"".join(ledger.stream(artifact, "weights", pool).pieces(0, SIZE))


@pytest.mark.parametrize("first", [by_opening, by_streaming])
@pytest.mark.parametrize("second", [by_opening, by_streaming])
@only_in_a_folder
def test_a_blob_is_hashed_once_however_it_is_read(
    ledger: Ledger, artifact: Artifact, hashed: Hashed, first: Read, second: Read
) -> None:
    hashed.bytes = 0
    found = first(ledger, artifact)
    assert hashed.bytes == SIZE
    assert second(Ledger(ledger.storage), artifact) == found
    assert hashed.bytes == SIZE


def test_a_file_that_is_opened_again_is_hashed_once(
    ledger: Ledger, artifact: Artifact, hashed: Hashed
) -> None:
    hashed.bytes = 0
    assert by_opening(ledger, artifact) == by_opening(Ledger(ledger.storage), artifact)
    assert hashed.bytes == SIZE


@pytest.mark.parametrize("read", [by_opening, by_streaming])
@pytest.mark.parametrize("place", [0, SIZE - 1])
@only_in_a_folder
def test_a_blob_that_changed_since_it_was_hashed_is_refused(
    ledger: Ledger, artifact: Artifact, read: Read, place: int
) -> None:
    read(ledger, artifact)
    overwrite(ledger.open_file(artifact, "weights"), place)
    with pytest.raises(IntegrityError, match="weights"):
        read(ledger, artifact)


def test_a_large_file_that_was_misread_once_is_right_and_no_wrong_hash_is_remembered(
    ledger: Ledger, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a network's disk or by memory. The second look is at the bytes, not at what was remembered of them."""
    hash_chunk, misread = artifacts._hash_chunk, [1, 1]

    def hashed(path: Path, number: int) -> str:
        return "0" * 64 if number and misread and misread.pop() else hash_chunk(path, number)

    monkeypatch.setattr(artifacts, "_hash_chunk", hashed)
    assert len(by_opening(ledger, artifact)) == SIZE
    assert misread == []
    assert len(by_opening(Ledger(ledger.storage), artifact)) == SIZE


@only_in_a_folder
def test_a_blob_that_is_deleted_before_it_is_opened_is_named(
    ledger: Ledger, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = ledger.storage.download

    def deleted(key: str, anew: bool = False) -> Path:
        path = download(key, anew)
        path.unlink(missing_ok=True)
        return path

    monkeypatch.setattr(ledger.storage, "download", deleted)
    for read in (by_opening, by_streaming):
        with pytest.raises(MissingError, match="has lost its file weights"):
            read(ledger, artifact)


@only_in_a_folder
def test_what_a_disk_does_not_take_is_not_committed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says once that a disk has lost what was written; the first who waits for it hears of it."""
    failures = [OSError(errno.EIO, "Input/output error")]

    def flush(file: Path) -> None:  # noqa: ARG001
        if failures:
            raise failures.pop()

    monkeypatch.setattr(scratch, "flush", flush)
    with scratch.scratch_folder() as folder:
        (folder / "lost").write_bytes(b"weights")
        with pytest.raises(StoreError, match="the disk did not take lost"):
            ledger.commit(origin("model", {"n": 1}), {"lost": folder / "lost"}, {})
    assert ledger.find(origin("model", {"n": 1}).ref) is None


@only_in_a_folder
def test_only_a_steps_own_files_are_linked_into_a_store(ledger: Ledger, tmp_path: Path) -> None:
    """A user's file stays the user's, and what a link of a hub's cache names is copied."""
    with scratch.scratch_folder() as folder:
        files = {"own": folder / "own", "users": tmp_path / "users", "linked": folder / "linked"}
        for name in ("own", "users"):
            files[name].write_text(name)
        (tmp_path / "etag").write_text("of the hub")
        files["linked"].symlink_to(tmp_path / "etag")
        made = ledger.commit(origin("model", {"n": 2}), files, {})
        stored = {name: ledger.open_file(made, name) for name in files}
        assert {name: path.stat().st_nlink for name, path in stored.items()} == {
            "own": 2,
            "users": 1,
            "linked": 1,
        }
    assert not any(path.is_symlink() for path in stored.values())
    for name in ("users", "etag"):
        (tmp_path / name).write_text("changed since")
    assert [path.read_text() for path in stored.values()] == ["own", "users", "of the hub"]


@only_in_a_folder
def test_a_blob_that_changes_while_it_is_read_is_refused(ledger: Ledger, artifact: Artifact) -> None:
    by_streaming(ledger, artifact)
    with ThreadPoolExecutor(1) as pool:
        stream = ledger.stream(artifact, "weights", pool)
        next(stream.pieces(0, 8, alone=True))
        overwrite(ledger.open_file(artifact, "weights"), CHUNK_BYTES)
        with pytest.raises(IntegrityError, match="weights"):
            list(stream.pieces(8, SIZE - 8))


@only_in_a_folder
def test_a_blob_that_was_read_in_part_is_hashed_again(
    ledger: Ledger, artifact: Artifact, hashed: Hashed
) -> None:
    hashed.bytes = 0
    with ThreadPoolExecutor(1) as pool:
        next(ledger.stream(artifact, "weights", pool).pieces(0, 8, alone=True))
    assert hashed.bytes == CHUNK_BYTES
    by_streaming(ledger, artifact)
    assert hashed.bytes == CHUNK_BYTES + SIZE


def test_verifying_a_store_hashes_every_byte_all_the_same(
    ledger: Ledger, artifact: Artifact, hashed: Hashed
) -> None:
    by_opening(ledger, artifact)
    hashed.bytes = 0
    assert not verify(ledger).problems
    assert hashed.bytes >= SIZE


@only_in_a_bucket
def test_a_damaged_copy_on_this_node_is_fetched_anew(ledger: Ledger, artifact: Artifact) -> None:
    found = by_opening(ledger, artifact)
    overwrite(ledger.open_file(artifact, "weights"), 17)
    assert by_opening(ledger, artifact) == found


def overwrite(file: Path, place: int) -> None:
    """Changes a byte, and sets back the time of the last write."""
    before = file.stat()
    with file.open("rb+") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
