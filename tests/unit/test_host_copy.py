"""Copies of tensors at the same place each time."""

from pathlib import Path

import pytest
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


class _Runtime:
    """A CUDA runtime that refuses, and keeps its error until a kernel is launched."""

    def __init__(self, refused: str) -> None:
        self.refused, self.error = refused, 0

    def cudaHostRegister(self, *_: int) -> int:
        return self._answer("lock")

    def cudaHostUnregister(self, _: int) -> int:
        return self._answer("unlock")

    def launch(self, *_: object, **__: object) -> None:
        error, self.error = self.error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")

    def _answer(self, call: str) -> int:
        if call == self.refused:
            self.error = 2
        return self.error


@pytest.mark.parametrize("refused", ["lock", "unlock"])
def test_memory_that_cannot_be_locked_or_unlocked_leaves_no_error_for_the_next_kernel(
    refused: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, copy = _Runtime(refused), HostCopy()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "ones", runtime.launch)
    copy._lock(torch.device("cuda"))
    copy.close()
    assert f"cannot be {refused}ed (CUDA error 2)" in caplog.text
    runtime.launch()
