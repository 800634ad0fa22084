"""A stored base and what changed of it, read as the whole model that they are.

Averages, exports and task vectors see dense weights: of LoRA, W + ΔW, and never A or B.
"""

from collections.abc import Iterator

import torch

from btm_cluster.errors import IncompatibleError
from btm_cluster.language_model.adapter_files import layer_of
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import Header, names_in_order
from btm_cluster.language_model.weighted_sums import SUMMED_AT_ONCE, cut


class ChangedWeights:
    """A base of which some tensors are replaced.

    Raises:
        IncompatibleError: tensors that the base has not, or has in another shape.
    """

    def __init__(self, base: StoredWeights, changed: StoredWeights) -> None:
        self._base, self._changed = base, changed
        self._names = {*names_in_order(changed.header)}
        for name in sorted(self._names):
            _check_shape(base, changed, name, changed.header[name]["shape"])

    @property
    def header(self) -> Header:
        return self._base.header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        return (self._changed if name in self._names else self._base).read(name, device)

    def __str__(self) -> str:
        return str(self._changed)


class LoraWeights:
    """A base beside which an adapter lies: an adapted tensor is W + scale · B·A, read in float32 whatever the
    base is stored in.

    `transposed` where W is stored as [in, out], as in GPT-2. Several threads may read pieces, in any order.

    Raises:
        IncompatibleError: an adapter of another base.
    """

    def __init__(
        self, base: StoredWeights, adapter: StoredWeights, scale: float, transposed: bool = False
    ) -> None:
        self._base, self._adapter, self._scale, self._transposed = base, adapter, scale, transposed
        self._matrices: dict[str, list[str]] = {}
        for stored in sorted(names_in_order(adapter.header)):  # of each layer A, then B
            self._matrices.setdefault(layer_of(stored), []).append(stored)
        for name, (a, b) in self._matrices.items():
            (_, width_in), (width_out, _) = adapter.header[a]["shape"], adapter.header[b]["shape"]
            shape = [width_in, width_out] if transposed else [width_out, width_in]
            _check_shape(base, adapter, name, shape)

    @property
    def header(self) -> Header:
        return self._base.header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        weight = self._base.read(name, device)
        if name not in self._matrices:
            return weight
        return weight.float() + self._change(name, 0, len(weight), device)

    def pieces(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        base = self._base.read(name).reshape(-1)[first : first + count]
        if name not in self._matrices:
            yield base
            return
        width = self.header[name]["shape"][1]
        for at, size in cut(count, SUMMED_AT_ONCE):  # products of one size, whose bits are the same
            place = first + at
            start, stop = place // width, -(-(place + size) // width)
            change = self._change(name, start, stop).reshape(-1)[place - start * width :][:size]
            yield change.add_(base[at : at + size])

    def _change(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """scale · B·A, of the rows of the weight from `start` to `stop`."""
        a_RI, b_OR = (self._adapter.read(one, device).float() for one in self._matrices[name])
        if self._transposed:
            return (b_OR @ a_RI[:, start:stop]).mul_(self._scale).T
        return (b_OR[start:stop] @ a_RI).mul_(self._scale)

    def __str__(self) -> str:
        return str(self._adapter)


def _check_shape(base: StoredWeights, delta: StoredWeights, name: str, shape: list[int]) -> None:
    known = base.header.get(name)
    if known is None or list(known["shape"]) != list(shape):
        raise IncompatibleError(
            f"{delta} does not fit the model that it changes",
            found=f"{name} of {shape}",
            expected=f"{list(known['shape'])} in {base}" if known else f"a tensor of {base}",
            remedy="use it with the base that it was trained on",
        )
