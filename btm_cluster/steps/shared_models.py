"""Models of a store, opened so that those of one base share its tensors in memory.

Each is a module tree of its own, so that whoever runs it need not know. The parameters that did not change are
the very same objects: moved or cast for one model, they are for all.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from btm_cluster.language_model.lora import lora_of, put_adapter
from btm_cluster.language_model.model import in_precision
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.steps.stored import base_of, open_adapter_config, open_model, open_stored, open_weights


class SharedModels:
    """The models that were opened, and the bases of which others hold what changed."""

    def __init__(self, ledger: Ledger, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Models are loaded to `device`, their parameters in `dtype`, but for what they share."""
        self._ledger, self._device, self._dtype = ledger, device, dtype
        self._opened: dict[Ref, PreTrainedModel] = {}

    def find(self, ref: Ref) -> PreTrainedModel | None:
        """A model that was opened."""
        return self._opened.get(ref)

    def open_each(
        self, refs: Iterable[Ref], before: "SharedModels | None" = None
    ) -> Iterator[PreTrainedModel]:
        """Models, each loaded once it is asked for; the first in float32, by which an engine tries how their
        architecture reads on, and casts it then. Its base follows: what the first does not share of it, others may.
        """
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

    def _over(self, base: PreTrainedModel, delta: Artifact) -> PreTrainedModel:
        """The model that `delta` is over its base."""
        open_weights(self._ledger, delta)  # refuses what is of another base
        stored = open_stored(self._ledger, delta)
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        if delta.facts["trains"] == "lora":
            model = copy.deepcopy(base, shared)
            put_adapter(model, lora_of(open_adapter_config(self._ledger, delta)), stored)
            return model
        for name, tensor in base.named_parameters():
            if name in stored.header:
                changed = stored.read(name).to(tensor.device, tensor.dtype, copy=True)
                shared[id(tensor)] = torch.nn.Parameter(changed, requires_grad=False)
        return copy.deepcopy(base, shared)
