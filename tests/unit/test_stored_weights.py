"""Tensors in files: written one at a time into the files that safetensors would write, and read back from
shards."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.stored_weights import open_files, tensors_of, write_weights
from btm_cluster.language_model.tensor_files import DTYPES, layout, write_tensors

SHAPES = {"scalar": (), "none": (0, 3), "matrix": (5, 3), "cube": (2, 3, 4)}
TENSORS = {
    f"{shape}.{dtype}": torch.randint(0, 2, SHAPES[shape]).to(DTYPES[dtype])
    for shape in SHAPES
    for dtype in DTYPES
}


def test_a_file_has_the_bytes_that_safetensors_would_write_whatever_order_tensors_come_in(
    tmp_path: Path,
) -> None:
    save_file(TENSORS, tmp_path / "expected", metadata={"format": "pt"})
    for order in (list(TENSORS), list(TENSORS)[::-1]):
        write_tensors(layout(TENSORS), ((name, TENSORS[name]) for name in order), tmp_path / "found")
        assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_tensor_is_written_in_the_type_that_the_header_says_from_whatever_memory(tmp_path: Path) -> None:
    transposed = torch.randn(4, 6).T
    header = layout({"t": torch.empty(6, 4, dtype=torch.bfloat16, device="meta")})
    files = write_weights(header, [("t", transposed)], tmp_path)
    found = open_files(files.__getitem__, is_sharded=False).read("t")
    assert torch.equal(found, transposed.bfloat16())


def test_shards_hold_at_most_their_size_and_read_as_the_whole(tmp_path: Path) -> None:
    files = write_weights(layout(TENSORS), TENSORS.items(), tmp_path, 200)
    assert len(files) > 3
    stored = open_files(files.__getitem__, is_sharded=True)
    found = dict(tensors_of(stored))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    sizes = [
        sum(t.nbytes for t in stored_alone(file).values()) for file in files.values() if "-of-" in file.name
    ]
    assert max(sizes) <= 200


def stored_alone(file: Path) -> dict[str, torch.Tensor]:
    return dict(tensors_of(open_files(lambda _: file, is_sharded=False)))


def test_a_tensor_that_never_came_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not written"):
        write_weights(layout(TENSORS), list(TENSORS.items())[1:], tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 1}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(IncompatibleError, match="no index of weights"):
        open_files(lambda name: tmp_path / name, is_sharded=True)
