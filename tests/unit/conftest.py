"""What the pure tests share: one order of every sum."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As training on one CPU sets it."""
    torch.set_num_threads(1)
