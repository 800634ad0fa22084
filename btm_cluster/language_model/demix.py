"""DEMix: a causal language model with one feed-forward per domain in every layer, everything else shared.

No gate.

Source: Gururangan et al., 2021. Any transformers model whose decoder layers call their feed-forward `mlp`
becomes one. A batch holds equally many blocks of every domain, domain after domain, so routing is a reshape.
Knows nothing of training.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from btm_cluster.errors import UserError
from btm_cluster.language_model.model import count_parameters, fresh_on_meta
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import Header, names_in_order, ordered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEED_FORWARD = re.compile(r"\.\d+\.mlp$")
_EXPERTS = ".mlp.experts."


class DomainFeedForwards(torch.nn.Module):
    """One feed-forward for each of D domains: every parameter and buffer of `mlp`
    stacked to [D, …], equal copies at first.

    `domains` are those that this process trains, in a group a part of all; of a stored state it takes its own
    rows, and of a dense model's a copy for each domain. All are applied at once, as batched matrix products:
    a loop over small experts is bound by kernel launches.
    """

    def __init__(self, mlp: torch.nn.Module, domains: range) -> None:
        super().__init__()
        self.domains = domains
        self.experts = mlp
        for module in mlp.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                stacked = parameter.detach().expand(len(domains), *parameter.shape).clone()
                setattr(module, name, torch.nn.Parameter(stacked))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.expand(len(domains), *buffer.shape).clone())
        self.register_load_state_dict_pre_hook(_take_own_rows)  # type: ignore[no-untyped-call]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Routes hidden states [D · blocks, tokens, width], domain after domain."""
        routed = hidden.reshape(len(self.domains), -1, hidden.shape[-1])
        apply = torch.vmap(self._apply_one, randomness="different")
        own = {**dict(self.experts.named_parameters()), **dict(self.experts.named_buffers())}
        return apply(own, routed).reshape(hidden.shape)

    def _apply_one(self, parameters: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        applied: torch.Tensor = functional_call(self.experts, parameters, (hidden,))
        return applied


def _take_own_rows(module: DomainFeedForwards, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        stacked = f"{prefix}experts.{name.removeprefix(prefix).removeprefix('experts.')}"
        state[stacked] = _rows(module, state.pop(name), is_dense=name != stacked)


def _rows(module: DomainFeedForwards, stored: torch.Tensor, is_dense: bool) -> torch.Tensor:
    if is_dense:
        return stored.expand(len(module.domains), *stored.shape)
    return stored[module.domains.start : module.domains.stop]


def own_moments(
    model: "PreTrainedModel", name: str, moment: str, stored: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """The part of an optimiser's stored `moment` of the parameter `name` that this
    process holds: its domains' rows, or all of it.

    Of what a dense model stored for a feed-forward, a copy for each domain. None of a parameter that never
    had a gradient.
    """
    owner = model.get_submodule(name.partition(".experts.")[0]) if has_row_per_domain(name) else None
    if not isinstance(owner, DomainFeedForwards):
        return stored.get(f"{moment}.{name}")
    is_dense = f"{moment}.{name}" not in stored
    known = stored.get(f"{moment}.{_dense_name(name) if is_dense else name}")
    return None if known is None else _rows(owner, known, is_dense).clone()


def split_feed_forwards(model: "PreTrainedModel", domains: range) -> None:
    """Makes `model` a DEMix, in place; `domains` are those that this process trains.

    Raises:
        UserError: its layers have no feed-forward that can be told, or have several already.
    """
    found = feed_forwards_of(model)
    if not found or any(hasattr(mlp, "experts") for mlp in found.values()):
        raise _refused(model, "layers of experts already" if found else "no submodule `mlp` in its layers")
    for name, mlp in found.items():
        model.set_submodule(name, DomainFeedForwards(mlp, domains))


def feed_forwards_of(model: "PreTrainedModel") -> dict[str, torch.nn.Module]:
    """The feed-forwards of a model's layers by name; none where they cannot be told."""
    return {name: mlp for name, mlp in model.named_modules() if _FEED_FORWARD.search(name)}


def check_splits(config: Mapping[str, Any], domains: int) -> None:
    """Refuses an architecture of which no DEMix can be made, before anything is spent on it.

    Raises:
        UserError: naming the architecture.
    """
    model = fresh_on_meta(config)
    split_feed_forwards(model, range(domains))
    feed_forward = next(module for module in model.modules() if isinstance(module, DomainFeedForwards))
    try:
        feed_forward(torch.empty(domains, 8, model.config.hidden_size, device="meta"))
    except Exception as exc:  # whatever a feed-forward of another kind fails on
        raise _refused(
            model, f"feed-forwards that take more than hidden states: {exc}".splitlines()[0]
        ) from exc


def has_row_per_domain(name: str) -> bool:
    """Whether a DEMix's parameter, by its name, is stacked over domains."""
    return _EXPERTS in name


class DensePart:
    """The weights of the ordinary model that a stored DEMix is for one domain: what is shared, and the domain's
    feed-forwards."""

    def __init__(self, demix: StoredWeights, domain: int) -> None:
        self._demix, self._domain = demix, domain
        self._stacked = {_dense_name(name): name for name in names_in_order(demix.header)}
        entries = {name: demix.header[stacked] for name, stacked in self._stacked.items()}
        rows = {
            name: {**entry, "shape": entry["shape"][1:]}
            for name, entry in entries.items()
            if has_row_per_domain(self._stacked[name])
        }
        self._header = ordered({**entries, **rows})

    @property
    def header(self) -> Header:
        return self._header

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        stacked = self._stacked[name]
        tensor = self._demix.read(stacked)
        return (tensor[self._domain] if has_row_per_domain(stacked) else tensor).to(device)

    def __str__(self) -> str:
        return str(self._demix)


def _dense_name(name: str) -> str:
    return name.replace(_EXPERTS, ".mlp.")


def count_demix_parameters(config: Mapping[str, Any], domains: int) -> tuple[int, int]:
    """All parameters of a DEMix, and those that are not embeddings: what is
    shared, and D times the feed-forwards."""
    total, non_embedding = count_parameters(config)
    feed_forwards = feed_forwards_of(fresh_on_meta(config)).values()
    split = sum(p.numel() for mlp in feed_forwards for p in mlp.parameters())
    return total + (domains - 1) * split, non_embedding + (domains - 1) * split


def _refused(model: "PreTrainedModel", found: str) -> UserError:
    return UserError(
        f"no DEMix can be made of a {model.config.model_type}",
        found=found,
        expected="decoder layers with one feed-forward each, called `mlp`, as in gpt2 or llama",
        remedy="take another architecture, or leave DEMix out of `baselines` and `study.systems`",
    )
