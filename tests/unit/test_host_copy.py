"""Copies of tensors at the same place each time."""

from pathlib import Path

import torch
from safetensors.torch import load

from btm_cluster.language_model.host_copy import ARENA_BYTES, HostCopy
from btm_cluster.language_model.model import save_weights


def test_each_copy_lies_where_the_last_one_lay_and_no_two_tensors_touch(tmp_path: Path) -> None:
    large = torch.arange(ARENA_BYTES // 4 + 1, dtype=torch.float32)  # more than is got at once
    tensors = {
        "a": torch.ones(3),
        "step": torch.tensor(7.0),
        "large": large,
        "b": torch.ones(2, 5).bfloat16(),
    }
    copy = HostCopy()
    first = copy.take(tensors.items())
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
    tensors["a"] += 1
    second = copy.take(tensors.items())
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == places
    assert all(torch.equal(second[name], tensor) for name, tensor in tensors.items())
    save_weights(second, tmp_path / "file")
    stored = load((tmp_path / "file").read_bytes())
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    copy.close()
