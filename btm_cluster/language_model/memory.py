"""An estimate of the memory that a training takes on each GPU, and the settings that follow from it.

Plain arithmetic on sizes: knows neither torch nor models.

Weights, gradients and Adam's two moments are float32: 16 bytes per parameter (Rajbhandari et al., 2020,
"ZeRO", section 3.1, whose mixed precision keeps the same amount). Sharded, each rank has its share of them, and
in full only what is gathered: the weights of a layer and of the next one, and a layer's gradient (ZeRO stage 3,
section 5). Activations follow Korthikanti et al., 2022, "Reducing activation recomputation in large transformer
models", section 4.1: what each layer keeps for its backward pass, here without dropout and with FlashAttention,
which keeps no matrix of scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

Setting: TypeAlias = Literal["auto", "on", "off"]
FLOAT32 = 4
USABLE_SHARE = 0.9
"""Usable share of a GPU's memory: the rest is CUDA's context, NCCL's buffers, and what the allocator cannot join."""


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
    frozen: int = 0
    """Parameters that are not trained: held in bfloat16, without gradient and moments."""


@dataclass(frozen=True)
class Way:
    """How one rank of a group computes its passes."""

    ranks: int
    blocks: int
    """Blocks in one forward pass."""
    block_tokens: int
    in_bfloat16: bool
    compiles: bool
    is_sharded: bool = False
    recomputes: bool = False
    """Whether a layer's input alone is kept, and its activations are computed once more."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Sharded: what is whole for a moment. Else: weights in the forward pass's precision, and what
    DistributedDataParallel sends gradients in."""
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def state(self) -> int:
        """The part that is there whatever the blocks."""
        return self.weights + self.gradients + self.optimizer


def memory_of(size: ModelSize, way: Way) -> Memory:
    """The estimate of a training's peak on each rank, at the start of a backward pass."""
    share = way.ranks if way.is_sharded else 1
    trained = -(-(size.parameters - size.frozen) // share)
    frozen = -(-size.frozen // share)
    return Memory(
        weights=FLOAT32 * trained + 2 * frozen,
        gradients=FLOAT32 * trained,
        optimizer=2 * FLOAT32 * trained,
        gathered=_gathered(size, way),
        activations=_activations(size, way),
        logits=_logits(size, way),
    )


def choose_way(
    size: ModelSize, way: Way, usable_bytes: float, sharding: Setting, recomputing: Setting
) -> Way:
    """The fastest way that fits into so many bytes, among those that the settings leave; where none does, the one
    that takes least.

    A group shards before it computes anything twice: that costs a third more arithmetic (a forward pass beside
    a forward and a backward one), and gathering overlaps with arithmetic.
    """
    ways = [
        replace(way, is_sharded=is_sharded, recomputes=recomputes)
        for recomputes in _left_by(recomputing)
        for is_sharded in _left_by(sharding if way.ranks > 1 else "off")
    ]
    fitting = [one for one in ways if memory_of(size, one).total <= usable_bytes]
    return fitting[0] if fitting else min(ways, key=lambda one: memory_of(size, one).total)


def _left_by(setting: Setting) -> Sequence[bool]:
    return {"auto": (False, True), "on": (True,), "off": (False,)}[setting]


def _gathered(size: ModelSize, way: Way) -> int:
    value = _bytes_per_value(way)
    if way.is_sharded:
        # Two parts' weights, one's gradient as it was computed, and in float32 on its way to the others.
        return size.largest_unit * (2 * value + value + FLOAT32)
    copies = value * size.parameters if way.in_bfloat16 else 0
    sent = FLOAT32 * (size.parameters - size.frozen) if way.ranks > 1 else 0
    return copies + sent


def _activations(size: ModelSize, way: Way) -> int:
    tokens = way.blocks * way.block_tokens
    kept_of_layer = tokens * _kept_per_token(size, way)
    if not way.recomputes:
        return size.layers * kept_of_layer
    return size.layers * tokens * size.width * _residual_bytes(way) + kept_of_layer


def _kept_per_token(size: ModelSize, way: Way) -> int:
    """Bytes that a layer keeps of each token: inputs of both norms and what they make of them, queries, keys,
    values and what attention makes of them, and the feed-forward's inside.

    Compiled, what is cheap to compute again is: the outputs of norms, and the products within a feed-forward.
    """
    value = _bytes_per_value(way)
    attention = 2 * size.queries + 2 * size.keys
    if way.compiles:
        inside = size.inner * (2 if size.is_gated else 1)
        return 2 * size.width * _residual_bytes(way) + value * (attention + inside)
    inside = size.inner * (4 if size.is_gated else 2)
    return 2 * size.width * _residual_bytes(way) + value * (2 * size.width + attention + inside)


def _logits(size: ModelSize, way: Way) -> int:
    """Compiled: logits and their gradient. Else also, in float32, the logits, their log-softmax and its
    gradient."""
    values = way.blocks * way.block_tokens * size.vocabulary
    if way.compiles:
        return values * 2 * _bytes_per_value(way)
    return values * (3 * FLOAT32 + (_bytes_per_value(way) if way.in_bfloat16 else 0))


def _bytes_per_value(way: Way) -> int:
    return 2 if way.in_bfloat16 else FLOAT32


def _residual_bytes(way: Way) -> int:
    """Bytes of a value of the hidden states between layers: under autocast these stay in float32."""
    return 2 if way.in_bfloat16 and way.is_sharded else FLOAT32
