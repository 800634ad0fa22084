"""The weights of a stored model, read one tensor at a time however they are stored, and written in shards.

Knows files and tensors, and nothing of architectures or stores.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open

from btm_cluster.language_model.tensor_files import (
    INDEX,
    Header,
    header_of,
    names_in_order,
    read_header,
    size_of,
    write_tensors,
)


class StoredWeights(Protocol):
    """A model's tensors by name, which lie elsewhere; as text, the place that an error names."""

    @property
    def header(self) -> Header:
        """Dtype, shape and place of each tensor, in the order in which they lie there."""

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor as it is stored; on the CPU it may be a view of a mapped file, not to be written to."""


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
        cut = {name: _cut_entry(whole[name], rows[name]) if name in rows else whole[name] for name in whole}
        self._header = header_of(cut, names_in_order(whole))

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        tensor = self._weights.read(name, device)
        return tensor[: self._rows[name]] if name in self._rows else tensor

    def __str__(self) -> str:
        return str(self._weights)


def write_shards(weights: StoredWeights, folder: Path, shard_bytes: int) -> list[str]:
    """Writes tensors into `folder` as transformers opens them: as one file, or as several of at most
    `shard_bytes` with an index. Returns the names of all files.

    A tensor that is larger has a file of its own. Memory: one tensor.
    """
    header = weights.header
    split = split_state_dict_into_shards_factory(
        {name: header[name] for name in names_in_order(header)},
        get_storage_size=size_of,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for shard, own in split.filename_to_tensors.items():
        write_tensors(header_of(header, own), map(weights.read, own), folder / shard)
    if not split.is_sharded:
        return list(split.filename_to_tensors)
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*split.filename_to_tensors, INDEX]


def _cut_entry(entry: Mapping[str, Any], rows: int) -> dict[str, Any]:
    held, *others = entry["shape"]
    return {**entry, "shape": [rows, *others], "data_offsets": [0, size_of(entry) // held * rows]}
