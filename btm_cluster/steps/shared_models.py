"""Models of a store, opened so that those of one base share its tensors in memory.

Each is a module tree of its own, so that whoever runs it need not know. The parameters that did not change are
the very same objects: moved or cast for one model, they are for all.
"""

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from btm_cluster.errors import UserError
from btm_cluster.language_model.adapter_files import lora_of
from btm_cluster.language_model.compute import free_memory
from btm_cluster.language_model.lora import put_adapter, with_other_adapter
from btm_cluster.language_model.model import in_precision
from btm_cluster.language_model.tensor_files import holds_weights
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.plan import Lora
from btm_cluster.steps.stored import base_of, open_adapter_config, open_model, open_stored, open_weights


class SharedModels:
    """The models that were opened, and the bases of which others hold what changed."""

    def __init__(self, ledger: Ledger, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Models are loaded to `device`, their parameters in `dtype`, but for what they share."""
        self._ledger, self._device, self._dtype = ledger, device, dtype
        self._opened: dict[Ref, PreTrainedModel] = {}
        self._adapted: dict[tuple[int, Lora], PreTrainedModel] = {}
        """The first model of each base and form of adapter, by the base's id: it is opened, and so alive."""

    def find(self, ref: Ref) -> PreTrainedModel | None:
        """A model that was opened."""
        return self._opened.get(ref)

    def open_each(
        self, refs: Collection[Ref], before: "SharedModels | None" = None
    ) -> Iterator[PreTrainedModel]:
        """Models, each loaded once it is asked for; the first in float32, by which an engine tries how their
        architecture reads on, and casts it then. Its base follows: what the first does not share of it, others may.

        Raises:
            UserError: the device has too little free memory for their weights; before any of them is read.
        """
        self._check_memory(refs, before)
        for number, ref in enumerate(refs):
            yield self.open(ref, before, self._dtype if number else torch.float32)
            if not number:
                for opened in self._opened.values():
                    in_precision(opened, self._dtype)

    def open(
        self, ref: Ref, before: "SharedModels | None" = None, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """A model, for evaluation: on the device and, unless `dtype` is named, in the type of all, or where and as
        its base is by now.

        What `before` has opened is taken from there.

        Raises:
            StoreError: it, or its base, is not in the store.
            IncompatibleError: its base is another model.
        """
        if ref not in self._opened:
            found = self._ledger.get(ref)
            # Even where the model itself is there: the next one may need it.
            base = self.open(base_of(self._ledger, found).ref, before, dtype) if found.is_delta else None
            model = before.find(ref) if before is not None else None
            if model is None:
                how = self._device, dtype or self._dtype
                model = open_model(self._ledger, found, *how) if base is None else self._over(base, found)
            self._opened[ref] = model.eval().requires_grad_(False)
        return self._opened[ref]

    def _check_memory(self, refs: Collection[Ref], before: "SharedModels | None") -> None:
        """Refuses models whose weights alone are more than what is free."""
        needed: dict[Ref, int] = {}
        for ref in refs:
            found = self._ledger.get(ref)
            while found.is_delta:
                needed[found.ref] = self._bytes(found)
                found = base_of(self._ledger, found)
            needed[found.ref] = self._bytes(found)
        lacking = [ref for ref in needed if before is None or before.find(ref) is None]
        total, free = sum(needed[ref] for ref in lacking), free_memory(torch.device(self._device))
        if total > free:
            raise UserError(
                f"the models do not fit the free memory of {'this machine' if self._device == 'cpu' else 'the GPU'}",
                found=f"{free / 1e9:,.1f} GB free",
                expected=f"at least {total / 1e9:,.1f} GB, for the weights of {len(refs)} models in "
                f"{str(self._dtype).removeprefix('torch.')}",
                remedy="take bfloat16 if this is float32, one average of them (`btm merge`), more memory, or to "
                "generate, fewer experts (`merging.top_k`)",
            )

    def _bytes(self, model: Artifact) -> int:
        """Bytes in memory of the weights that a model itself holds; at least, since some are stored in 16 bits."""
        stored = sum(blob.size_bytes for blob in model.blobs if holds_weights(blob.name))
        in_16_bits = model.recipe.get("training", {}).get("weights") == "bfloat16"
        return stored * self._dtype.itemsize // (2 if in_16_bits else 4)

    def _over(self, base: PreTrainedModel, delta: Artifact) -> PreTrainedModel:
        """The model that `delta` is over its base."""
        open_weights(self._ledger, delta)  # refuses what is of another base
        stored = open_stored(self._ledger, delta)
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        if delta.facts["trains"] == "lora":
            lora = lora_of(open_adapter_config(self._ledger, delta))
            alike = self._adapted.get((id(base), lora))
            if alike is not None:
                return with_other_adapter(alike, stored)
            model = copy.deepcopy(base, shared)
            put_adapter(model, lora, stored)
            self._adapted[id(base), lora] = model
            return model
        for name, tensor in base.named_parameters():
            if name in stored.header:
                changed = stored.read(name).to(tensor.device, tensor.dtype, copy=True)
                shared[id(tensor)] = torch.nn.Parameter(changed, requires_grad=False)
        return copy.deepcopy(base, shared)
