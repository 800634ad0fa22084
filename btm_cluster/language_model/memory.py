"""An estimate of the memory that a training takes on each GPU, and the settings that follow from it.

Plain arithmetic on sizes: knows neither torch nor models. Meant to be within 15 % of the most that torch's allocator
holds; `benchmarks/memory_estimates.py` compares them. CUDA's context, NCCL's buffers and what the allocator cannot
join come on top.

State: weights, gradients and Adam's two moments are float32, 16 bytes per parameter (Rajbhandari et al., 2020,
"ZeRO", section 3.1, whose mixed precision keeps the same amount); fused AdamW and clipping write in place. Muon
keeps one moment of a matrix. What is frozen has weights alone. Sharded, each rank has its share of all of these, and
in full only what is gathered: the weights of a layer and of the next one, and a layer's gradient (ZeRO stage 3,
section 5).

Copies: autocast multiplies by bfloat16 copies of float32 weights. A backward pass uses them again, so that all of
them are kept until then, whether compiled (the partitioner does not compute again what a matrix product reads) or
not (autocast's cache); of layers that are computed twice, one's at a time. DistributedDataParallel sends gradients
from buckets beside them.

Activations: what each layer keeps for its backward pass follows Korthikanti et al., 2022, "Reducing activation
recomputation in large transformer models", section 4.1, here without dropout and with FlashAttention, which keeps
no matrix of scores; where attention is transformers' eager one (scores with a cap), a layer keeps its matrices, too.
Under autocast the hidden states between layers and the norms are float32. torch.compile keeps
what eager autograd keeps but for products that are not multiplied by a matrix, such as a gated feed-forward's SiLU.

The terms of one process were compared with what torch's partitioner keeps, and with the memory records of its
profiler on a CPU (docs/decisions/training.md); those of groups are arithmetic alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Setting: TypeAlias = Literal["auto", "on", "off"]
FLOAT32, BFLOAT16 = 4, 2
USABLE_SHARE = 0.9
"""Usable share of a GPU's memory: the rest is CUDA's context, NCCL's buffers, and what the allocator cannot join."""

WHOLE_GRAPH_LAYERS = 24
"""Layers of the deepest model that is compiled as a whole; with adapters, of which each traces half as much again as
the layer, half as many."""


def is_compiled_whole(layers: int, has_adapters: bool) -> bool:
    """Whether a model is compiled as one graph, which fuses what lies between layers. The time that takes grows with
    the layers; compiled by itself, one layer serves all."""
    return layers * (2 if has_adapters else 1) <= WHOLE_GRAPH_LAYERS


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model, in numbers of values."""

    parameters: int
    largest_unit: int
    """Parameters of the largest part that is gathered at once: a layer, or the embeddings."""
    layers: int
    width: int
    """Width of the hidden states between layers."""
    queries: int
    """Width of all heads' queries together."""
    keys: int
    """Width of all heads' keys together; values are as wide."""
    inner: int
    """Width within a feed-forward."""
    is_gated: bool
    """Whether a feed-forward multiplies two projections, as SwiGLU does."""
    vocabulary: int
    cast: int = 0
    """Parameters of the layers that are held in float32 and multiplied by: autocast copies them."""
    cast_head: int = 0
    """Those of the output matrix, if it is held so."""
    frozen: int = 0
    """Parameters that are not trained: without gradient and moments."""
    frozen_linear: int = 0
    """Those of them that are held in the precision of the forward pass."""
    by_muon: int = 0
    """Trained parameters of which the optimiser keeps one moment, not two."""
    adapters: int = 0
    """Width of all adapters of a layer together, where LoRA is trained: rank times adapted linear maps."""
    eager_heads: int = 0
    """Heads of a layer that keep a score of each token for each of its block; none of FlashAttention and its like."""


@dataclass(frozen=True)
class PassSettings:
    """Settings by which one rank of a group computes its passes."""

    ranks: int
    blocks: int
    """Blocks in one forward pass."""
    block_tokens: int
    in_bfloat16: bool
    compiles: bool
    is_sharded: bool = False
    recomputes: bool = False
    """Whether a layer's input alone is kept, and its activations are computed once more."""
    passes: int = 1
    """Forward passes of an update: from the second one on, gradients are there already."""
    logits_at_once: int | None = None
    """Logits of a piece, where the head is applied to a few tokens at a time; None: to all."""

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.blocks * self.block_tokens

    def makes_one_graph_of(self, size: ModelSize) -> bool:
        """Whether a model is compiled as a whole, whose backward pass gives all gradients at its end."""
        has_parts = self.is_sharded or self.recomputes or self.logits_at_once
        return self.compiles and not has_parts and is_compiled_whole(size.layers, size.adapters > 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: each part at its largest, and the peak of their sum, since they are not all there at
    once."""

    weights: int
    gradients: int
    optimizer: int
    copies: int
    """Weights in the forward pass's precision, or sharded, what is whole for a moment; and what
    DistributedDataParallel sends gradients in."""
    activations: int
    logits: int
    peak: int

    @property
    def state(self) -> int:
        """The part that is there whatever the blocks."""
        return self.weights + self.gradients + self.optimizer


def memory_of(size: ModelSize, settings: PassSettings) -> Memory:
    """The estimate of a training's memory on each rank.

    The peak is at the start of a backward pass, when all activations are there and the gradients of earlier
    passes; or at its end, when only gradients are.
    """
    share = settings.ranks if settings.is_sharded else 1
    trained = FLOAT32 * _share(size.parameters - size.frozen, share)
    moments = 2 * trained - FLOAT32 * _share(size.by_muon, share)
    whole = size.frozen - size.frozen_linear
    weights = trained + FLOAT32 * _share(whole, share) + _value(settings) * _share(size.frozen_linear, share)
    buckets = 0 if settings.is_sharded or settings.ranks == 1 else trained
    copies, activations, logits = (
        _copies(size, settings),
        _activations(size, settings),
        _logits(size, settings),
    )
    state = weights + moments + buckets
    before = trained if settings.passes > 1 else 0
    # Whole graphs hand out all gradients together, which are then added to those that are there.
    after = trained + (before if settings.makes_one_graph_of(size) else 0)
    at_start = before + copies + activations + max(logits, _within_a_layer(size, settings))
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=moments,
        copies=copies + buckets,
        activations=activations,
        logits=logits,
        peak=state + max(at_start, after),
    )


def _share(values: int, ranks: int) -> int:
    return -(-values // ranks)


def choose_settings(
    size: ModelSize, settings: PassSettings, usable_bytes: float, sharding: Setting, recomputing: Setting
) -> PassSettings:
    """The fastest settings that fit into so many bytes, among those that are left open; where none does, the one
    that takes least.

    A group shards before it computes anything twice: that costs a third more arithmetic (a forward pass beside
    a forward and a backward one), and gathering overlaps with arithmetic.
    """
    candidates = candidate_settings(settings, sharding, recomputing)
    fitting = [one for one in candidates if memory_of(size, one).peak <= usable_bytes]
    return fitting[0] if fitting else min(candidates, key=lambda one: memory_of(size, one).peak)


def candidate_settings(settings: PassSettings, sharding: Setting, recomputing: Setting) -> list[PassSettings]:
    """The settings that are left open, the fastest first."""
    return [
        replace(settings, is_sharded=is_sharded, recomputes=recomputes)
        for recomputes in _left_by(recomputing)
        for is_sharded in _left_by(sharding if settings.ranks > 1 else "off")
    ]


def _left_by(setting: Setting) -> Sequence[bool]:
    return {"auto": (False, True), "on": (True,), "off": (False,)}[setting]


def _copies(size: ModelSize, settings: PassSettings) -> int:
    value = _value(settings)
    if settings.is_sharded:
        # Two parts' weights, one's gradient as it was computed, and in float32 on its way to the others.
        return size.largest_unit * (2 * value + value + FLOAT32)
    if not settings.in_bfloat16:
        return 0
    at_once = (
        _share(size.cast, size.layers)
        if settings.recomputes and settings.compiles and size.layers
        else size.cast
    )
    return BFLOAT16 * (at_once + size.cast_head)


def _activations(size: ModelSize, settings: PassSettings) -> int:
    kept_of_layer = settings.tokens * _kept_per_token(size, settings)
    hidden = settings.tokens * size.width * 2 * _value(settings)  # of the last norm: what it reads, and makes
    if not settings.recomputes:
        return size.layers * kept_of_layer + hidden
    return size.layers * settings.tokens * size.width * _value(settings) + kept_of_layer + hidden


def _kept_per_token(size: ModelSize, settings: PassSettings) -> int:
    """Bytes that a layer keeps of each token: inputs of both norms and what they make of them, queries, keys,
    values and what attention makes of them, the feed-forward's inside, adapters' inside, and eager attention's
    scores."""
    values = 4 * size.width + 2 * size.queries + 2 * size.keys
    if size.adapters:  # by which attention's output is cast once more
        values += size.adapters + size.queries
    # Gated: both projections and their product, and not compiled, the gate's SiLU.
    inside = size.inner * ((3 if settings.compiles else 4) if size.is_gated else 2)
    # In bfloat16 twice, capped and as probabilities, and the latter in float32 too; in float32 the two alone.
    scores = size.eager_heads * settings.block_tokens * 2 * FLOAT32
    return _value(settings) * (values + inside) + scores


def _within_a_layer(size: ModelSize, settings: PassSettings) -> int:
    """Bytes that a layer's backward pass takes for a moment: gradients of the feed-forward's inside, or of eager
    attention's scores, and of what goes on to the layer before."""
    inside = _value(settings) * size.inner * (3 if size.is_gated else 2)
    # Before and after the softmax, which is in float32 unless it is fused with its casts.
    score = 2 * (_value(settings) if settings.compiles else FLOAT32)
    scores = size.eager_heads * settings.block_tokens * score
    return settings.tokens * (max(inside, scores) + _value(settings) * 2 * size.width)


def _logits(size: ModelSize, settings: PassSettings) -> int:
    """The head's part of a backward pass: logits, their gradient, and that of the head's own weights.

    In one compiled graph the logits' gradient takes the place of the logits. Where the loss alone is compiled it
    does not. Else there are, in float32, their log-softmax, its gradient and theirs. In pieces there are a piece's
    logits, these in float32 and their log-softmax, and the gradient of the head's weights from the forward pass on.
    """
    values, value = settings.tokens * size.vocabulary, _value(settings)
    head = size.cast_head if size.frozen == 0 else 0
    if settings.logits_at_once:
        return min(values, settings.logits_at_once) * (value + 2 * FLOAT32) + FLOAT32 * head
    if not settings.compiles:
        return values * 3 * FLOAT32
    if not settings.makes_one_graph_of(size):
        return values * 2 * value
    return max(values * value, FLOAT32 * head) + value * head


def _value(settings: PassSettings) -> int:
    """Bytes of a value in the forward pass."""
    return BFLOAT16 if settings.in_bfloat16 else FLOAT32
