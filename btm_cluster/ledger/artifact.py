"""Values: what an artifact's manifest says, and the keys under which a store has it."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from btm_cluster.errors import IntegrityError, MissingError
from btm_cluster.identity import Inputs, Ref, identity_by
from btm_cluster.storage.file_hashes import FoundFile

CHUNK_BYTES = 8 * 2**20
HASHED_AT_ONCE = 4
"""Chunks of a file, as many threads: hashing leaves Python's lock."""
CHUNKS = "chunks"
"""The kind of digest that is remembered of a file: that of the SHA-256 of its chunks."""
_READ_BYTES = 2**18
"""As much of a chunk stays in a core's cache from its reading to its hashing."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """A named file of an artifact, by its content."""

    name: str
    size_bytes: int
    sha256: str
    chunks: tuple[str, ...]
    """SHA-256 of each 8 MiB, so that ranges can be checked too."""


class Named(Protocol):
    """An artifact to be made, named by what it is made from: a step's request, for instance."""

    @property
    def ref(self) -> Ref: ...

    @property
    def recipe(self) -> Mapping[str, Any]: ...

    @property
    def inputs(self) -> Inputs: ...


@dataclass(frozen=True)
class Origin:
    """Names an artifact that is made in passing, without a request of its own."""

    ref: Ref
    recipe: Mapping[str, Any]
    inputs: Inputs


@dataclass(frozen=True)
class Artifact:
    """A committed artifact, as its manifest says it."""

    kind: str
    identity: str
    recipe: Mapping[str, Any]
    inputs: Inputs
    parts: tuple[Ref, ...]
    """Artifacts that the same step committed and that this one consists of:
    the text that a source was read into."""
    facts: Mapping[str, Any]
    """Results beside the files: the same for equal runs in one numerics profile."""
    note: Mapping[str, Any]
    """Circumstances: when, where, how fast, called what.

    Never used to decide anything but estimates and what is purged.
    """
    blobs: tuple[Blob, ...]
    manifest_hash: str

    @property
    def ref(self) -> Ref:
        return Ref(self.kind, self.identity)

    @property
    def made_from(self) -> tuple[Ref, ...]:
        """Every input."""
        return tuple(ref for refs in self.inputs.values() for ref in refs)

    @property
    def needs(self) -> tuple[Ref, ...]:
        """Artifacts without which this one is of no use: its inputs and parts.

        A trained model is whole without its start, unless it holds only what changed of that.
        """
        left_out = () if self.is_delta else ("start",)
        inputs = (ref for role, refs in self.inputs.items() if role not in left_out for ref in refs)
        return (*inputs, *self.parts)

    @property
    def is_delta(self) -> bool:
        """Whether it holds only what changed of the model that it started from."""
        return "trains" in self.facts

    @property
    def parents(self) -> tuple[str, ...]:
        """Identities of the models that a model was made from: its start, those that
        it averages or mixes, their common ancestor, what else a mixture of experts has, or the DEMix it is
        part of."""
        roles = ("start", "models", "base", "rest", "demix")
        return tuple(ref.identity for role in roles for ref in self.inputs.get(role, ()))

    def blob(self, name: str) -> Blob:
        """The file called `name`."""
        for blob in self.blobs:
            if blob.name == name:
                return blob
        raise MissingError(
            f"{self.kind} {self.identity[:12]} has no file {name}", found=str([b.name for b in self.blobs])
        )

    def has(self, name: str) -> bool:
        """Whether the artifact has a file called `name`."""
        return any(blob.name == name for blob in self.blobs)


def check_artifact(artifact: Artifact, key: str) -> None:
    """Refuses an artifact that is not what the key of its manifest says, or whose
    files cannot be what it says of them.

    Raises:
        IntegrityError: naming the key.
    """
    training = artifact.kind == "training"
    own = (
        training_key(artifact.identity, artifact.recipe["update"]) if training else artifact_key(artifact.ref)
    )
    if own != key:
        raise _refused(f"{key} is another artifact's manifest", own, key)
    if (made_from := named_identity(artifact)) != artifact.identity:
        raise _refused(f"{key} is not of the recipe and inputs that it names", made_from, artifact.identity)
    names = [blob.name for blob in artifact.blobs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _refused(f"{key} names a file twice", ", ".join(sorted(twice)), "a name of its own for each")
    for blob in artifact.blobs:
        if wrong := _blob_problem(blob):
            raise _refused(
                f"{key} names a file that cannot be", f"{blob.name!r}: {wrong}", "a file that was stored"
            )


def named_identity(made: Named | Artifact) -> str:
    """The identity that recipe and inputs give.

    A text's is over its documents; a training checkpoint has its model's.
    """
    if made.ref.kind == "text":
        return str(made.recipe["documents"])
    if made.ref.kind == "training":
        return identity_by("model", made.recipe["model"], made.inputs)
    return identity_by(made.ref.kind, made.recipe, made.inputs)


def _blob_problem(blob: Blob) -> str:
    """Why an artifact cannot have such a file; nothing, if it can."""
    if blob.name in ("", ".", "..") or "/" in blob.name or "\0" in blob.name:
        return "a name that no file can have"
    if blob.size_bytes < 0 or not all(map(_SHA256.fullmatch, (blob.sha256, *blob.chunks))):
        return "a size or SHA-256 that is none"
    if len(blob.chunks) != -(-blob.size_bytes // CHUNK_BYTES):
        return f"{len(blob.chunks)} chunk hashes for {blob.size_bytes} bytes"
    if len(blob.chunks) == 1 and blob.chunks != (blob.sha256,):
        return "another SHA-256 for its only chunk than for the whole"
    return ""


def _refused(what: str, found: str, expected: str) -> IntegrityError:
    remedy = "restore it from a backup, or move it out of the store and run the plan again"
    return IntegrityError(what, found=found, expected=expected, remedy=remedy)


def describe_file(name: str, path: Path) -> Blob:
    """The blob that the file at `path` would be: its size, SHA-256 and chunk hashes.

    Chunks are hashed beside the whole, in a second thread.
    """
    with path.open("rb") as file, ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:
        size = os.fstat(file.fileno()).st_size
        chunks = [pool.submit(_hash_chunk, path, number) for number in range(-(-size // CHUNK_BYTES))]
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        return Blob(name, size, whole, tuple(chunk.result() for chunk in chunks))


def is_file_of(blob: Blob, path: Path) -> bool:
    """Whether a file has a blob's bytes: its size, and SHA-256 of every chunk, several at a time.

    Of a large file this is remembered for as long as it stays as it is.

    Raises:
        FileNotFoundError: it is gone.
    """
    if path.stat().st_size != blob.size_bytes or not blob.chunks:
        return describe_file(blob.name, path) == blob

    def digest(file: Path) -> bytes:
        with ThreadPoolExecutor(HASHED_AT_ONCE, thread_name_prefix="hash") as pool:
            return digest_of_chunks(pool.map(partial(_hash_chunk, file), range(len(blob.chunks))))

    expected = digest_of_chunks(blob.chunks)
    return FoundFile(path).make(CHUNKS, digest, expected) == expected


def digest_of_chunks(chunks: Iterable[str]) -> bytes:
    """SHA-256 of all chunks' SHA-256, as hexadecimal text in their order: 32 bytes."""
    return hashlib.sha256("".join(chunks).encode()).digest()


def _hash_chunk(path: Path, number: int) -> str:
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(_READ_BYTES)), CHUNK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(number * CHUNK_BYTES)
        while count := file.readinto(buffer[:left]):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def artifact_key(ref: Ref) -> str:
    """The key of an artifact's manifest."""
    return f"artifacts/{ref.kind}/{ref.identity}.json"


def blob_key(ref: Ref, sha256: str) -> str:
    """The key of a file of an artifact."""
    folder = training_folder(ref.identity) if ref.kind == "training" else ""
    return f"{folder}blobs/{sha256}"


def pin_key(version: int) -> str:
    """The key of the pin that keeps a version of the forest from being collected."""
    return f"pins/{version:06d}.json"


def training_folder(identity: str) -> str:
    """Below it are a model's training checkpoints."""
    return f"training/{identity}/"


def training_key(identity: str, update: int) -> str:
    """The key of the manifest of a training checkpoint."""
    return f"{training_folder(identity)}{update:09d}.json"
