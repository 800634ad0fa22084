"""Files of artifacts: written, and read back with every byte checked against the manifest."""

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from btm_cluster.errors import IntegrityError, MissingError
from btm_cluster.identity import Ref
from btm_cluster.ledger.artifact import (
    CHUNK_BYTES,
    CHUNKS,
    Artifact,
    Blob,
    artifact_key,
    blob_key,
    describe_file,
    digest_of_chunks,
    is_file_of,
    training_folder,
)
from btm_cluster.storage import Storage
from btm_cluster.storage.file_hashes import FoundFile
from btm_cluster.storage.scratch import flushed_meanwhile, is_in_scratch, on_disk_of


def write_blobs(storage: Storage, ref: Ref, files: Mapping[str, Path]) -> list[Blob]:
    """Stores files of an artifact, in order of their names. Those in a scratch folder may be linked into the store."""
    # A folder on the same disk takes them as they are, and then waits for the disk.
    own = {path for path in files.values() if is_in_scratch(path)}
    linked = (
        [] if storage.copies_bytes else [path for path in own if on_disk_of(Path(storage.location), path)]
    )
    with flushed_meanwhile(linked):
        blobs = [describe_file(name, path) for name, path in sorted(files.items())]
    for blob in blobs:
        path = files[blob.name]
        storage.upload(blob_key(ref, blob.sha256), path, keep=path not in own)
    return blobs


def open_blob(storage: Storage, artifact: Artifact, name: str) -> Path:
    """A local file with the blob called `name`, checked.

    Raises:
        IntegrityError: the bytes are not those that were written, even when read a second time.
    """
    blob = artifact.blob(name)
    key = blob_key(artifact.ref, blob.sha256)
    for again in (False, True):  # a mismatch is read once more from the source before it fails
        with _named_if_lost(artifact.ref, blob):
            path = storage.download(key, anew=again)
        try:
            if is_file_of(blob, path):
                return path
            found = describe_file(name, path)
        except FileNotFoundError:  # deleted since
            found = None
        if found == blob:  # it was misread before
            return path
    if found is None:
        raise _lost(artifact.ref, blob, "no such object")
    raise _damaged(
        artifact,
        blob,
        f"{found.size_bytes} bytes, SHA-256 {found.sha256}",
        f"{blob.size_bytes} bytes, SHA-256 {blob.sha256}",
    )


def read_blob(storage: Storage, artifact: Artifact, name: str) -> Iterator[bytes]:
    """The bytes of the blob called `name` in order, each chunk checked before it
    is given; nothing is kept on disk.

    Raises:
        IntegrityError: naming the first chunk that is not what was written, even when read a second time.
    """
    for number in range(len(artifact.blob(name).chunks)):
        yield read_chunk(storage, artifact, name, number)


def read_chunk(storage: Storage, artifact: Artifact, name: str, number: int) -> bytes:
    """The bytes of one chunk of the blob called `name`, checked.

    Raises:
        IntegrityError: it is not what was written, even when read a second time.
    """
    blob = artifact.blob(name)
    start, expected = number * CHUNK_BYTES, blob.chunks[number]
    for _ in range(2):
        with _named_if_lost(artifact.ref, blob):
            chunk = storage.read(blob_key(artifact.ref, blob.sha256), start, CHUNK_BYTES)
        found = hashlib.sha256(chunk).hexdigest()
        if found == expected:
            return chunk
    at = f"bytes {start:,} to {start + len(chunk):,}"
    raise _damaged(artifact, blob, f"SHA-256 {found} of {at}", f"SHA-256 {expected}")


class BlobStream:
    """The blob called `name`, read in order of its bytes, each chunk checked; nothing is kept on disk.

    The chunk in use is held, of 8 MiB, and with `ahead` the next one, which `pool` reads and checks meanwhile:
    from the first read on until `drop`, or until the blob's end is read. In a folder chunks are parts of the mapped
    file, which take no memory of their own, and the next one is always read ahead.
    """

    def __init__(
        self, storage: Storage, artifact: Artifact, name: str, pool: Executor, ahead: bool = True
    ) -> None:
        self._blob, self._pool = artifact.blob(name), pool
        self._again = partial(read_chunk, storage, artifact, name)
        self._mapped = None if storage.copies_bytes else _mapped(storage, artifact, self._blob)
        self._ahead = ahead or self._mapped is not None
        self._held: dict[int, Future[memoryview]] = {}

    def pieces(self, start: int, size: int, alone: bool = False) -> Iterator[memoryview]:
        """The bytes from `start` on, `size` of them, in order; pieces begin with a chunk, but for the first.

        `alone`, no chunk is read ahead of those that they are in.

        Raises:
            IntegrityError: a chunk is not what was written, even when read a second time.
        """
        stop = start + size
        while start < stop:
            number, first = divmod(start, CHUNK_BYTES)
            last = number + 1 if self._ahead and not alone else number
            wanted = range(number, min(last + 1, len(self._blob.chunks)))
            for passed in self._held.keys() - set(wanted):
                del self._held[passed]
            for each in wanted:
                if each not in self._held:
                    self._held[each] = self._pool.submit(self._chunk, each)
            piece = self._held[number].result()[first : first + stop - start]
            start += len(piece)
            if start == self._blob.size_bytes:
                self.drop()
            yield piece

    def drop(self) -> None:
        """Holds no chunk any more: it is read again where it is asked for."""
        self._held.clear()

    def _chunk(self, number: int) -> memoryview:
        found = self._mapped and self._mapped.chunk(number)
        # Writable memory, since torch warns of other.
        return found or memoryview(bytearray(self._again(number)))


class _MappedBlob:
    """A blob's file where it lies, its bytes copied if they are written to.

    Chunks are hashed, but for those of a large file that this node remembers as the blob's, while it is as it was
    found. That it is the blob's is remembered once all its chunks were hashed.
    """

    def __init__(self, blob: Blob, found: FoundFile, mapped: mmap.mmap) -> None:
        self._blob, self._found, self._bytes = blob, found, memoryview(mapped)
        self._digest = digest_of_chunks(blob.chunks)
        self._is_known = found.recall(CHUNKS) == self._digest
        self._unchecked = set(range(len(blob.chunks)))

    def chunk(self, number: int) -> memoryview | None:
        """A chunk's bytes; None where they are not the blob's."""
        chunk = self._bytes[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        if self._is_known and self._found.is_same():
            return chunk
        if hashlib.sha256(chunk).hexdigest() != self._blob.chunks[number]:
            return None
        if number in self._unchecked:
            self._unchecked.discard(number)
            if not self._unchecked:
                self._found.remember(CHUNKS, self._digest)
        return chunk


def _mapped(storage: Storage, artifact: Artifact, blob: Blob) -> _MappedBlob | None:
    """A file where it lies; None where it is not whole."""
    with _named_if_lost(artifact.ref, blob):
        path = storage.download(blob_key(artifact.ref, blob.sha256))
        found, opened = FoundFile(path), path.open("rb")
    with opened as file:
        if not blob.size_bytes or os.fstat(file.fileno()).st_size != blob.size_bytes:
            return None
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return _MappedBlob(blob, found, mapped)


def check_blob_stands(storage: Storage, ref: Ref, blob: Blob) -> None:
    """Refuses to go on without a file of an artifact.

    Raises:
        MissingError: it is not there, or of another size.
    """
    with _named_if_lost(ref, blob):
        found = storage.size(blob_key(ref, blob.sha256))
    if found != blob.size_bytes:
        raise _lost(ref, blob, f"{found} bytes of {blob.size_bytes}")


@contextmanager
def _named_if_lost(ref: Ref, blob: Blob) -> Iterator[None]:
    """Says which artifact lost a file, where the store says only that an object is not there, or a folder's file is
    deleted before it is opened."""
    try:
        yield
    except (MissingError, FileNotFoundError) as exc:
        raise _lost(ref, blob, "no such object") from exc


def _lost(ref: Ref, blob: Blob, found: str) -> MissingError:
    manifest = training_folder(ref.identity) if ref.kind == "training" else artifact_key(ref)
    return MissingError(
        f"{ref.kind} {ref.identity[:12]} has lost its file {blob.name} ({blob_key(ref, blob.sha256)})",
        found=found,
        remedy=f"delete {manifest} and run the plan again, which makes it anew",
    )


def _damaged(artifact: Artifact, blob: Blob, found: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"{artifact.kind} {artifact.identity[:12]}, file {blob.name} ({blob_key(artifact.ref, blob.sha256)}) "
        "is damaged",
        found=found,
        expected=expected,
        remedy="restore the object from a backup, or delete the artifact's manifest and run the plan again",
    )
