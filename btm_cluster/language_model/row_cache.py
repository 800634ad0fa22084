"""Experts that read all rows at once, each row at its own place, into keys and values at fixed addresses.

Serves models whose only memory is attention, full or within a window. The forward pass is transformers' own;
here are the cache that it fills, the masks, and the captured graphs, one for each expert, which run beside
each other.

B rows of one pass, H heads, S places of a row, L places that a pass attends to, beside the letters of
decoding.py.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.cuda_graphs import Graphs
from btm_cluster.language_model.decoding import CACHE, ReadPrompt, RowBuffers, are_alike, beginnings
from btm_cluster.language_model.scoring import said_of

READ_AT_ONCE = 8192
"""Tokens of prompts in one forward pass, padding included: their logits are
0.8 GB in bf16 for a vocabulary of 50,000."""
_SHORTEST = 256
"""Places that a pass attends to, at least; then twice as many, and so on:
each number is a graph of its own."""
_PLACES_MULTIPLE = 16
"""Attention kernels want masks whose rows are aligned."""


@dataclass
class _Pass:
    """Rows and places of the forward pass under way, the same for every layer of an expert."""

    rows: torch.Tensor | None = None
    """Rows into which prompts are read; None while all rows read on."""
    sources: torch.Tensor | None = None
    """The prompt of each of these rows."""
    places_B: torch.Tensor | None = None
    """Where each row reads on."""
    attended: int = 0


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
        kept_BHSD = kept_RHSD[: len(fresh_BHTD)]
        kept_BHSD.scatter_(2, where_BHTD, fresh_BHTD)
        return kept_BHSD[:, :, : now.attended]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given

    def get_max_length(self) -> int:
        return self._shape[1]


class RowCacheDecoder:
    """Experts with keys and values for every row, and a captured graph for every
    expert, number of rows and length."""

    def __init__(
        self, models: Sequence[PreTrainedModel], buffers: RowBuffers, block_tokens: int, captures: bool
    ) -> None:
        self.buffers = buffers
        self._models = models
        self._rows = len(buffers.tokens_R)
        self._places = -(-block_tokens // _PLACES_MULTIPLE) * _PLACES_MULTIPLE
        self._passes = [_Pass() for _ in models]
        self._caches = [
            Cache(layer_class_to_replicate=functools.partial(_RowLayer, self._rows, self._places, under_way))
            for under_way in self._passes
        ]
        self._graphs = Graphs(buffers.tokens_R.device, len(models), captures)

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs: so far none has failed."""
        return self._graphs.captures

    @property
    def bytes_per_row(self) -> int:
        """Bytes of keys and values of all experts, once something was read."""
        layers = [layer for cache in self._caches for layer in cache.layers]
        return int(sum(kept.nbytes for layer in layers for kept in (layer.keys, layer.values))) // self._rows

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
        said = []
        for expert, model in enumerate(self._models):
            self._passes[expert].rows, self._passes[expert].sources = into, sources
            logits_BTV = self._ask(expert, model, ids_BT)
            self.buffers.logits_ERV[expert, into] = logits_BTV[sources, lasts_B[sources]]
            said.append(said_of(logits_BTV.flatten(0, 1), targets_BT.flatten()))
        logp_EBT, entropy_EBT = (
            torch.stack(values).view(-1, *ids_BT.shape).double().cpu() for values in zip(*said, strict=True)
        )
        lengths = [len(prompt) for prompt in prompts]
        return [ReadPrompt(logp_EBT[:, b, : n - 1], entropy_EBT[:, b, :n]) for b, n in enumerate(lengths)]

    def read_on(self, rows: Sequence[int], experts: Sequence[int], longest: int) -> None:
        """All rows up to the last of these read on, those between them too."""
        row_count = up_to(max(rows) + 1, 1, self._rows)
        attended = up_to(longest + 1, _SHORTEST, self._places)
        work = {expert: functools.partial(self._read_on, expert, row_count, attended) for expert in experts}
        self._graphs.run_all((row_count, attended), work)

    def _read_on(self, expert: int, row_count: int, attended: int) -> None:
        model, under_way = self._models[expert], self._passes[expert]
        places_B = self.buffers.places_R[:row_count]
        under_way.rows, under_way.places_B, under_way.attended = None, places_B, attended
        masks = decoding_masks(model, places_B, attended)
        logits_B1V = self._ask(
            expert,
            model,
            self.buffers.tokens_R[:row_count, None],
            attention_mask=masks,
            position_ids=places_B[:, None],
        )
        self.buffers.logits_ERV[expert, :row_count] = logits_B1V[:, 0]

    def _ask(self, expert: int, model: PreTrainedModel, ids_BT: torch.Tensor, **more: Any) -> torch.Tensor:
        more[CACHE] = self._caches[expert]
        logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=True, **more).logits
        return logits_BTV

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


@torch.inference_mode()
def reads_rows_as_it_scores(model: PreTrainedModel, block_tokens: int) -> bool:
    """Whether a model predicts so as it does when it reads a block at once,
    whatever rows it reads beside each other.

    A made-up block is read as a prompt and then on: after its first token, in one row alone; then so beside a
    row that begins nearly at its end.
    """
    block_1T = random_block(model.config.vocab_size, block_tokens).to(model.device)
    at_once_TV = logits_of(model, block_1T, type(model).__name__)[0]
    tokens, firsts = block_1T[0].tolist(), beginnings(block_tokens)
    try:
        return all(_reads_on(model, tokens, at_once_TV, tried) for tried in (firsts[:1], firsts))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # architectures without such a cache raise whatever they stumble over
        return False


def _reads_on(
    model: PreTrainedModel, tokens: Sequence[int], at_once_TV: torch.Tensor, firsts: Sequence[int]
) -> bool:
    """Reads the first tokens of a block into a row for each number of them, and
    two more; compares every prediction."""
    buffers = RowBuffers.on(model.device, 1, len(firsts), at_once_TV.shape[1], at_once_TV.dtype)
    decoder = RowCacheDecoder([model.eval()], buffers, len(tokens), captures=False)
    rows = list(range(len(firsts)))
    decoder.read([tokens[:first] for first in firsts], [[row] for row in rows])
    for further in range(3):
        counts = torch.tensor([min(first + further, len(tokens)) for first in firsts])
        if not are_alike(buffers.logits_ERV[0], at_once_TV[counts - 1]):
            return False
        places = counts.clamp(max=len(tokens) - 1)
        buffers.places_R.copy_(places)
        buffers.tokens_R.copy_(torch.tensor(tokens)[places])
        decoder.read_on(rows, [0], int(places.max()))
    return True
