"""Experts that read all rows at once, each row at its own place, into keys and values at fixed addresses.

Serves models whose only memory is attention, full or within a window. The forward pass is transformers' own;
here are the cache that it fills, the masks, and the captured graphs, one for each stack of experts
(adapter_stacks.py), which run beside each other.

B rows of one pass, N experts of a stack, H heads, S places of a row, L places that a pass attends to, beside the
letters of decoding.py. A stack's cache has N rows for each of the engine's: one of each expert.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from btm_cluster.language_model.adapter_stacks import Stack, alone
from btm_cluster.language_model.cuda_graphs import Graphs
from btm_cluster.language_model.decoding import CACHE, ReadPrompt, RowBuffers
from btm_cluster.language_model.scoring import said_of

READ_AT_ONCE = 8192
"""Tokens of prompts in one forward pass, padding included: their logits are
0.8 GB in bf16 for a vocabulary of 50,000."""
_SHORTEST = 256
"""Places that a pass attends to, at least; then twice as many, and so on:
each number is a graph of its own."""
_FEW = 4
"""Where fewer than one of so many experts of a stack are asked to read on, each does alone: on two cores a pass of 32
small ones took as long as seven of one."""
_PLACES_MULTIPLE = 16
"""Attention kernels want masks whose rows are aligned."""


@dataclass
class _Pass:
    """Rows and places of the forward pass under way, the same for every layer of a stack."""

    rows: torch.Tensor | None = None
    """Rows into which prompts are read; None while all rows read on."""
    sources: torch.Tensor | None = None
    """The prompt of each of these rows."""
    places_B: torch.Tensor | None = None
    """Where each row reads on."""
    attended: int = 0
    first: int = 0
    """The first of the cache's rows that read on, and the step from each to the next: an expert that reads alone has
    one of each N."""
    step: int = 1


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer: [R, H, S, …]."""

    is_compileable = True
    is_sliding = False

    def __init__(self, rows: int, places: int, under_way: _Pass) -> None:
        super().__init__()
        self._shape = (rows, places)
        self._pass = under_way

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, places = self._shape
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], places, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores what was computed, and returns what is to be attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._take_in(self.keys, key_states), self._take_in(self.values, value_states)

    def _take_in(self, kept_RHSD: torch.Tensor, fresh_BHTD: torch.Tensor) -> torch.Tensor:
        now, tokens = self._pass, fresh_BHTD.shape[2]
        if now.rows is not None:  # a prompt attends to itself, and padding is to its right
            kept_RHSD[now.rows, :, :tokens] = fresh_BHTD[now.sources]
            return fresh_BHTD
        assert now.places_B is not None
        where_BHTD = now.places_B[:, None, None, None].expand_as(fresh_BHTD)
        kept_BHSD = kept_RHSD[now.first :: now.step][: len(fresh_BHTD)]
        kept_BHSD.scatter_(2, where_BHTD, fresh_BHTD)
        return kept_BHSD[:, :, : now.attended]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self._shape[1]


class _Reading:
    """A stack of experts and what it keeps of all rows."""

    def __init__(self, stack: Stack, rows: int, places: int, device: torch.device) -> None:
        self.model, self.experts = stack.model, stack.experts
        self.experts_N = torch.tensor(stack.experts, device=device)
        # Captured graphs read these addresses, whatever a newer engine gives the same models.
        self._held = [parameter.data for parameter in stack.model.parameters()]
        self.under_way = _Pass()
        layer = functools.partial(_RowLayer, rows * len(stack.experts), places, self.under_way)
        self._cache = Cache(layer_class_to_replicate=layer)

    @property
    def kept(self) -> list[torch.Tensor]:
        """Keys and values of every layer, once something was read."""
        return [states for layer in self._cache.layers for states in (layer.keys, layer.values)]

    def ask(self, model: PreTrainedModel, ids_BT: torch.Tensor, **more: Any) -> torch.Tensor:
        """Logits of the stack's model, or of one of its experts: [B, T, V]."""
        more[CACHE] = self._cache
        logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=True, **more).logits
        return logits_BTV


class RowCacheDecoder:
    """Experts with keys and values for every row, and a captured graph for every stack of them, number of rows and
    length."""

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        buffers: RowBuffers,
        block_tokens: int,
        captures: bool,
        stacks: Sequence[Stack] | None = None,
    ) -> None:
        """By default each model is a stack of its own."""
        device = buffers.tokens_R.device
        self.buffers = buffers
        self._models = models
        self._rows = len(buffers.tokens_R)
        self._places = -(-block_tokens // _PLACES_MULTIPLE) * _PLACES_MULTIPLE
        stacks = alone(models) if stacks is None else stacks
        self._stacks = [_Reading(stack, self._rows, self._places, device) for stack in stacks]
        self._graphs = Graphs(device, len(models) + len(stacks), captures)

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs: so far none has failed."""
        return self._graphs.captures

    @property
    def bytes_per_row(self) -> int:
        """Bytes of keys and values of all experts, once something was read."""
        return sum(kept.nbytes for stack in self._stacks for kept in stack.kept) // self._rows

    def read(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[ReadPrompt]:
        """The longest first, in as few passes as there is room for."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: dict[int, ReadPrompt] = {}
        while order:
            at_once = max(1, READ_AT_ONCE // len(prompts[order[0]]))
            taken, order = order[:at_once], order[at_once:]
            read = self._read([prompts[i] for i in taken], [rows[i] for i in taken])
            found |= dict(zip(taken, read, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _read(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[ReadPrompt]:
        device, longest = self.buffers.tokens_R.device, len(prompts[0])
        ids_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]).to(device)
        targets_BT = torch.cat([ids_BT[:, 1:], torch.zeros_like(ids_BT[:, :1])], dim=1)
        lasts_B = torch.tensor([len(prompt) - 1 for prompt in prompts]).to(device)
        sources = torch.tensor([i for i, into in enumerate(rows) for _ in into]).to(device)
        into = torch.tensor([row for into in rows for row in into]).to(device)
        said = {}
        for stack in self._stacks:
            for number, expert in enumerate(stack.experts):
                stack.under_way.rows = into * len(stack.experts) + number
                stack.under_way.sources = sources
                logits_BTV = stack.ask(self._models[expert], ids_BT)
                self.buffers.logits_ERV[expert, into] = logits_BTV[sources, lasts_B[sources]]
                said[expert] = said_of(logits_BTV.flatten(0, 1), targets_BT.flatten())
        logp_EBT, entropy_EBT = (
            torch.stack(values).view(-1, *ids_BT.shape).double().cpu()
            for values in zip(*(said[expert] for expert in range(len(self._models))), strict=True)
        )
        lengths = [len(prompt) for prompt in prompts]
        return [ReadPrompt(logp_EBT[:, b, : n - 1], entropy_EBT[:, b, :n]) for b, n in enumerate(lengths)]

    def read_on(self, rows: Sequence[int], experts: Sequence[int], longest: int) -> None:
        """All rows up to the last of these read on, those between them too; and all experts of a stack, unless few of
        them are asked to."""
        row_count = up_to(max(rows) + 1, 1, self._rows)
        attended = up_to(longest + 1, _SHORTEST, self._places)
        work: dict[int, Callable[[], None]] = {}
        for number, stack in enumerate(self._stacks):
            asked = {*experts}.intersection(stack.experts)
            if len(asked) * _FEW < len(stack.experts):
                for expert in asked:
                    work[expert] = functools.partial(self._read_on, number, row_count, attended, expert)
            else:
                work[len(self._models) + number] = functools.partial(
                    self._read_on, number, row_count, attended
                )
        self._graphs.run_all((row_count, attended), work)

    def _read_on(self, number: int, row_count: int, attended: int, alone: int | None = None) -> None:
        """One token of each row by a stack's experts, or by one of them."""
        stack = self._stacks[number]
        under_way, model, experts_N = stack.under_way, stack.model, stack.experts_N
        under_way.first, under_way.step = 0, 1
        if alone is not None:
            place, model = stack.experts.index(alone), self._models[alone]
            experts_N = experts_N[place : place + 1]
            under_way.first, under_way.step = place, len(stack.experts)
        count = len(experts_N)
        tokens_B = self.buffers.tokens_R[:row_count].repeat_interleave(count)
        places_B = self.buffers.places_R[:row_count].repeat_interleave(count)
        under_way.rows, under_way.places_B, under_way.attended = None, places_B, attended
        masks = decoding_masks(model, places_B, attended)
        logits_B1V = stack.ask(model, tokens_B[:, None], attention_mask=masks, position_ids=places_B[:, None])
        logits_NRV = logits_B1V.view(row_count, count, -1).transpose(0, 1)
        self.buffers.logits_ERV[:, :row_count].index_copy_(0, experts_N, logits_NRV)

    def forget(self, row: int) -> None:
        """Nothing: a row is written over."""


def up_to(needed: int, smallest: int, largest: int) -> int:
    """The first of smallest, twice that, and so on that is enough, but at most the largest."""
    while smallest < needed:
        smallest *= 2
    return min(smallest, largest)


def decoding_masks(model: PreTrainedModel, places_B: torch.Tensor, attended: int) -> Any:
    """Mask of the places that one token of each row attends to, added to attention scores: [B, 1, 1, L],
    by type of layer where there are several."""
    kinds = _layer_types(model.config)
    behind_BL = places_B[:, None] - torch.arange(attended, device=places_B.device)
    masks = {}
    for kind in kinds:
        is_seen_BL = behind_BL >= 0
        if kind != "full_attention":
            is_seen_BL = is_seen_BL & (behind_BL < model.config.sliding_window)
        hidden_BL = torch.zeros_like(is_seen_BL, dtype=model.dtype)
        masks[kind] = hidden_BL.masked_fill(~is_seen_BL, torch.finfo(model.dtype).min)[:, None, None]
    return masks if len(masks) > 1 else masks[kinds[0]]


def _layer_types(config: PretrainedConfig) -> list[str]:
    """Kinds of attention, by transformers' names."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return sorted(set(types))
    return ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
