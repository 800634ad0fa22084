"""The weights of a stored model, read one tensor at a time however they are stored, and written in shards.

Knows files and tensors, and nothing of architectures or stores.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open

from btm_cluster.errors import IncompatibleError, one_line
from btm_cluster.language_model.tensor_files import (
    INDEX,
    WEIGHTS,
    Header,
    TensorWriter,
    check_shape,
    header_of,
    names_in_order,
    read_header,
    size_of,
)

SHARD_BYTES = 5 * 10**9
"""The most bytes of weights in a file, as huggingface_hub has it by default."""
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


class StoredWeights(Protocol):
    """A model's tensors by name, which lie elsewhere; as text, the place that an error names."""

    @property
    def header(self) -> Header:
        """Shape and place of each tensor, in the order in which they lie there, and the dtype that it is to be
        stored in again."""

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor as it is stored; on the CPU it may be a view of a mapped file, not to be written to."""


@runtime_checkable
class ReadInPieces(Protocol):
    """Weights of which some elements are read without the rest of their tensor."""

    @property
    def header(self) -> Header: ...

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        """A tensor's elements from `first` on, `count` of them, flattened, in order; not to be written to."""


class TensorFiles:
    """The tensors of one safetensors file, or of several shards.

    Headers are read at once, files opened when the first of their tensors is read.

    Raises:
        FileNotFoundError: a file is not there.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        headers = [(file, read_header(file)) for file in files]
        self._file_of = {name: file for file, header in headers for name in names_in_order(header)}
        entries = {name: entry for _, header in headers for name, entry in header.items()}
        self._header = header_of(entries, self._file_of)
        self._opened = cache(lambda file: safe_open(file, framework="pt"))

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        tensor: torch.Tensor = self._opened(self._file_of[name]).get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.to(device)

    def __str__(self) -> str:
        return str(self._files[0]) + (f" and {len(self._files) - 1} more" if self._files[1:] else "")


class FirstRows:
    """A model's tensors, some of which, by name, have their first rows alone."""

    def __init__(self, weights: StoredWeights, rows: Mapping[str, int]) -> None:
        self._weights, self._rows = weights, rows
        whole = weights.header
        cut = {name: {**whole[name], "shape": [n, *whole[name]["shape"][1:]]} for name, n in rows.items()}
        self._header = header_of({**whole, **cut}, names_in_order(whole))

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        tensor = self._weights.read(name, device)
        return tensor[: self._rows[name]] if name in self._rows else tensor

    def __str__(self) -> str:
        return str(self._weights)


def tensors_of(
    weights: StoredWeights, count: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors by name, one after the other; `count` is told of each that is done with."""
    for name in names_in_order(weights.header):
        yield name, weights.read(name)
        count(1)


def parts_of(
    weights: StoredWeights, count: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """All elements in order: a tensor's name, the place of the part's first element in it, and the part.

    Parts are tensors, or the pieces in which they are read; `count` is told of each tensor that is done with.
    """
    if not isinstance(weights, ReadInPieces):
        yield from ((name, 0, tensor) for name, tensor in tensors_of(weights, count))
        return
    for name in names_in_order(weights.header):
        first = 0
        for piece in weights.pieces(name, 0, math.prod(weights.header[name]["shape"])):
            yield name, first, piece
            first += len(piece)
        count(1)


def write_weights(
    header: Header,
    tensors: Iterable[tuple[str, torch.Tensor]],
    folder: Path,
    shard_bytes: int | None = None,
) -> dict[str, Path]:
    """Writes tensors, in any order, into `folder` as transformers opens them: as one file, or as several of at
    most `shard_bytes`, or else SHARD_BYTES, with an index. Returns all files by name.

    A tensor that is larger has a file of its own. Memory: one tensor.
    """
    return write_parts(header, _whole(header, tensors), folder, shard_bytes)


def _whole(
    header: Header, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    for name, tensor in tensors:
        check_shape(header, name, tensor)
        yield name, 0, tensor


def write_parts(
    header: Header,
    parts: Iterable[tuple[str, int, torch.Tensor]],
    folder: Path,
    shard_bytes: int | None = None,
) -> dict[str, Path]:
    """Writes tensors as `write_weights` does, each whole or in parts: its name, the place of the part's first
    element among the tensor's, and the part. Memory: one part.
    """
    with ShardWriter(header, folder, shard_bytes) as writer:
        for name, first, part in parts:
            writer.write(name, first, part)
    return writer.files


class ShardWriter:
    """A model's files in the making, as `write_parts` writes them; its parts come in any order."""

    def __init__(self, header: Header, folder: Path, shard_bytes: int | None = None) -> None:
        split = split_state_dict_into_shards_factory(
            {name: header[name] for name in names_in_order(header)},
            get_storage_size=size_of,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES if shard_bytes is None else shard_bytes,
        )
        self._shard_of = split.tensor_to_filename
        self.files = {shard: folder / shard for shard in split.filename_to_tensors}
        """All files by name, whole once this is left."""
        with ExitStack() as stack:
            self._writers = {
                shard: stack.enter_context(TensorWriter(header_of(header, own), folder / shard))
                for shard, own in split.filename_to_tensors.items()
            }
            self._stack = stack.pop_all()
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            self.files[INDEX] = folder / INDEX
            self.files[INDEX].write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def write(self, name: str, first: int, part: torch.Tensor) -> None:
        """Writes a tensor's elements from `first` on; each element is to be written once."""
        self._writers[self._shard_of[name]].write_part(name, first, part)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failed: Any) -> None:
        self._stack.__exit__(*failed)


def write_shards(
    weights: StoredWeights,
    folder: Path,
    shard_bytes: int | None = None,
    count: Callable[[int], None] = lambda _: None,
) -> dict[str, Path]:
    """Writes a stored model into `folder`, as `write_weights` does; `count` is told of each tensor."""
    return write_parts(weights.header, parts_of(weights, count), folder, shard_bytes)


def holds_whole_weights(name: str) -> bool:
    """Whether a file of a whole model's folder, by its name, holds weights, or says which files do."""
    return name == INDEX or _WEIGHT_FILE.fullmatch(name) is not None


def open_files(locate: Callable[[str], Path], is_sharded: bool) -> TensorFiles:
    """The weights of one file or several, which `locate` finds by name.

    Raises:
        IncompatibleError: an index that is none.
    """
    names = shards_of(locate(INDEX)) if is_sharded else [WEIGHTS]
    return TensorFiles([locate(name) for name in names])


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index names, in order.

    Raises:
        IncompatibleError: it is none.
    """
    try:
        found: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        return sorted(set(map(str, found.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise IncompatibleError(
            f"{index.name} is no index of weights",
            found=one_line(exc) or type(exc).__name__,
            expected="`weight_map`: the file of each tensor, by name",
            remedy="save the model again",
        ) from exc
