"""Dense models as one mixture of experts, in an architecture that transformers and vLLM know.

The feed-forwards of several models become the experts of every layer; attention, embeddings and norms are one
model's. Tensors are composed one at a time. Knows configurations and names of tensors; routers are given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PretrainedConfig

from btm_cluster.errors import UserError
from btm_cluster.language_model.configuration import config_from
from btm_cluster.language_model.model import count_parameters, fresh_on_meta, layout_of
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import DTYPES, Header, names_in_order

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
IDLE_CHANNELS = 64
"""Width of the shared expert that Qwen2-MoE cannot do without: all of it is zero, and so is what it adds. Zero
channels would do in transformers; vLLM loads no empty tensors, and splits the width over GPUs."""
_FEED_FORWARD = re.compile(r"(.*\.layers\.(\d+)\.mlp)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Target:
    """The architecture of experts that a dense one becomes, with the same attention, norms and names."""

    model_type: str
    kept: tuple[str, ...] = ()
    """Fields that it takes over beside those that all have."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Fields that it calls otherwise, by their dense name."""
    added: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    """Values that the dense configuration must have, since transformers or vLLM knows no others."""


_RENORMALISED = {"norm_topk_prob": True}
"""The weights of the chosen experts sum to one; Mixtral always does so."""
TARGETS: Mapping[str, Target] = {
    "llama": Target(
        "mixtral",
        ("intermediate_size", "head_dim"),
        added={"sliding_window": None},
        only={"attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Target("mixtral", ("intermediate_size", "head_dim", "sliding_window")),
    "qwen2": Target(
        "qwen2_moe",
        ("intermediate_size",),
        renamed={"intermediate_size": "moe_intermediate_size"},
        added={**_RENORMALISED, "shared_expert_intermediate_size": IDLE_CHANNELS, "qkv_bias": True},
        only={"use_sliding_window": False, "head_dim": None},
    ),
    "qwen3": Target(
        "qwen3_moe",
        ("intermediate_size", "head_dim", "attention_bias"),
        {"intermediate_size": "moe_intermediate_size"},
        _RENORMALISED,
        {"use_sliding_window": False},
    ),
    "olmo2": Target("flex_olmo", ("intermediate_size",), added=_RENORMALISED, only={"attention_bias": False}),
}
"""By dense model type. vLLM never renormalises FlexOlmo's weights, which is the same: a norm follows."""


def check_target(config: Mapping[str, Any]) -> None:
    """Refuses an architecture whose experts no stock mixture can hold.

    Raises:
        UserError: naming it, or the field that has no place.
    """
    _target_of(config_from(config))


def mixture_config(config: Mapping[str, Any], experts: int, experts_per_token: int) -> dict[str, Any]:
    """The configuration of a mixture of so many models of a configuration.

    Raises:
        UserError: there is no target for it, or fewer experts than a token is to have.
    """
    dense = config_from(config)
    target = _target_of(dense)
    if not 1 <= experts_per_token <= experts:
        raise UserError(
            "a token cannot have that many experts",
            found=f"{experts_per_token} of {experts}",
            expected=f"at least 1, at most {experts}",
        )
    kept = {name: getattr(dense, name) for name in (*_SHARED_FIELDS, *target.kept)}
    renamed = {new: getattr(dense, name) for name, new in target.renamed.items()}
    number = "num_local_experts" if target.model_type == "mixtral" else "num_experts"
    counts = {number: experts, "num_experts_per_tok": experts_per_token}
    return {"model_type": target.model_type, **kept, **renamed, **target.added, **counts}


def _target_of(dense: PretrainedConfig) -> Target:
    target = TARGETS.get(dense.model_type)
    if target is None:
        raise UserError(
            f"a {dense.model_type} has no mixture of experts: no stock architecture has its layers with several "
            "feed-forwards",
            expected=f"one of {', '.join(TARGETS)}",
            remedy="use the ensemble or an average of these models, or grow a forest of another architecture",
        )
    for name, only in {"hidden_act": "silu", **target.only}.items():
        if getattr(dense, name, only) != only:
            raise UserError(
                f"this {dense.model_type} has no mixture of experts: {target.model_type} has no such layers",
                found=f"{name}: {getattr(dense, name)}",
                expected=f"{name}: {only}",
                remedy="use the ensemble or an average of these models",
            )
    return target


@dataclass(frozen=True)
class Size:
    """Parameters of a mixture, and what a token costs."""

    parameters: int
    active_parameters: int
    """Parameters that a token passes: all but the feed-forwards that are not chosen."""
    inference_cost: float
    """Against one of the dense models, by parameters that a token passes, embeddings left out."""


def size_of_mixture(config: Mapping[str, Any], experts: int, experts_per_token: int) -> Size:
    """The size of a mixture of models of a configuration."""
    mixture = mixture_config(config, experts, experts_per_token)
    parameters, computed = count_parameters(mixture)
    _, dense = count_parameters(config)
    expert = sum(
        p.numel() for name, p in fresh_on_meta(config).named_parameters() if _FEED_FORWARD.fullmatch(name)
    )
    idle = (experts - experts_per_token) * expert
    return Size(parameters, parameters - idle, (computed - idle) / dense)


class MixtureWeights:
    """The tensors of a mixture, named and stacked as transformers holds them in memory, as every stored model's
    are.

    `routers` are the weights [experts, width] of every layer. Reading one takes as much memory as that tensor
    of each expert.
    """

    def __init__(
        self,
        rest: StoredWeights,
        experts: Sequence[StoredWeights],
        routers: Sequence[torch.Tensor],
        config: Mapping[str, Any],
    ) -> None:
        self._rest, self._experts, self._routers = rest, experts, routers
        dtype = next(e["dtype"] for name, e in rest.header.items() if _FEED_FORWARD.fullmatch(name))
        self._header = layout_of(fresh_on_meta(config), DTYPES[dtype])

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A tensor of the mixture."""
        return self._composed(name).to(device)

    def _composed(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        dtype = DTYPES[entry["dtype"]]
        layer, _, part = name.partition(".mlp.")
        if not part:
            return self._rest.read(name)
        if part == "gate.weight":
            return self._routers[int(layer.rpartition(".")[2])].to(dtype)
        stacked = torch.zeros(entry["shape"], dtype=dtype)
        if part.startswith("shared_expert"):
            return stacked
        names = ("gate_proj", "up_proj") if part == "experts.gate_up_proj" else ("down_proj",)
        for place, expert in zip(stacked, self._experts, strict=True):
            for piece, own in zip(place.chunk(len(names)), names, strict=True):
                piece.copy_(expert.read(f"{layer}.mlp.{own}.weight"))
        return stacked

    def __str__(self) -> str:
        return f"the mixture of {len(self._experts)} models with {self._rest}"


def differ_in_feed_forwards_alone(rest: StoredWeights, experts: Sequence[StoredWeights]) -> bool:
    """Whether all that is no feed-forward is the same in these models, bit by bit: a mixture is then exact, in
    that each token is computed by whole experts. Stops at the first tensor that differs."""
    others = (name for name in names_in_order(rest.header) if not _FEED_FORWARD.fullmatch(name))
    return all(
        torch.equal(rest.read(name).float(), expert.read(name).float())
        for name in others
        for expert in experts
    )
