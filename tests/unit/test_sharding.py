"""A sharded model on one rank: its values, what is tied, what is frozen, and layers of several architectures."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from btm_cluster.errors import IncompatibleError, TrainingError
from btm_cluster.language_model.compute import Compute
from btm_cluster.language_model.layers import layers_of, recompute_activations
from btm_cluster.language_model.model import (
    build_model,
    fresh_on_meta,
    fresh_without_values,
    save_weights,
    weights_of,
)
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.language_model.sharding import (
    clip_gradients,
    gather,
    hand_out,
    is_sharded,
    load_own,
    shard,
)
from btm_cluster.language_model.stored_weights import TensorFiles

T = TypeVar("T")
CPU = torch.device("cpu")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 64},
    "llama": {"model_type": "llama", "intermediate_size": 24, **SIZES},
    "tied llama": {"model_type": "llama", "intermediate_size": 24, "tie_word_embeddings": True, **SIZES},
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 24, **SIZES},
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 24,
        "num_local_experts": 2,
        "num_key_value_heads": 1,
        **SIZES,
    },
}
for config in CONFIGS.values():
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessGroup]:
    """A group of one, as torch sees it."""
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield ProcessGroup.joined(CPU)
    dist.destroy_process_group()


def compute(precision: str = "float32") -> Compute:
    return Compute(CPU, 1, 4, precision, compile=False, is_sharded=True)


def sharded(name: str, group: ProcessGroup) -> PreTrainedModel:
    model = fresh_without_values(CONFIGS[name])
    shard(model, compute(), group)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sharded_model_has_the_values_and_the_gradients_of_a_whole_one(
    group: ProcessGroup, name: str, tmp_path: Path
) -> None:
    whole = build_model(CONFIGS[name], random_seed=3)
    model = sharded(name, group)
    hand_out(model, whole, group)
    assert is_sharded(model)
    assert not is_sharded(whole)
    stored = weights_of(whole)
    found = dict(gather(weights_of(model)))
    assert list(found) == list(stored)
    assert all(torch.equal(found[one], stored[one]) for one in stored)
    assert {n: b.tolist() for n, b in model.named_buffers()} == {
        n: b.tolist() for n, b in whole.named_buffers()
    }

    ids = torch.arange(24).reshape(2, 12)
    expected = _norm_after_a_pass(whole, ids)
    recompute_activations(model)
    assert _norm_after_a_pass(model, ids) == pytest.approx(expected, rel=1e-6)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "only shares are left after a pass"

    save_weights(stored, tmp_path / "model.safetensors")
    again = sharded(name, group)
    load_own(again, TensorFiles([tmp_path / "model.safetensors"]))
    assert all(torch.equal(tensor, stored[one]) for one, tensor in gather(weights_of(again)))


def _norm_after_a_pass(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Loss, and the norm of all gradients before they are clipped."""
    model.train()
    torch.manual_seed(0)  # for dropout, which gpt2 has
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    norm = clip_gradients(model.parameters(), 1.0)
    clipped = torch.stack(
        [own.square().sum() for _, own in gather({n: p.grad for n, p in model.named_parameters()})]
    )
    assert clipped.sum().sqrt().item() == pytest.approx(min(1.0, norm.item()), rel=1e-4)
    return loss.item(), norm.item()


def test_weights_of_another_model_are_refused_by_name(group: ProcessGroup, tmp_path: Path) -> None:
    model = sharded("llama", group)
    other = weights_of(build_model(CONFIGS["llama"] | {"intermediate_size": 32}, 0))
    del other["lm_head.weight"]
    save_weights({**other, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        IncompatibleError, match=r"missing: lm_head\.weight; unexpected: more; of another shape"
    ):
        load_own(model, TensorFiles([tmp_path / "model.safetensors"]))


def test_frozen_bfloat16_and_trained_float32_lie_in_one_layer(group: ProcessGroup) -> None:
    """As an adapter's weights do beside its base's."""
    model = build_model(CONFIGS["llama"], 0)
    for name, parameter in model.named_parameters():
        if "q_proj" not in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.bfloat16()
    shard(model, compute("bfloat16"), group)
    ids = torch.arange(12).reshape(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "q_proj" in name}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_layers_are_found_by_what_they_are() -> None:
    for config in CONFIGS.values():
        layers = layers_of(fresh_on_meta(config))
        assert len(layers) == 3
        assert len({type(layer) for layer in layers}) == 1


@dataclass(frozen=True)
class OfTwo(ProcessGroup):
    """A rank of two, of which the first leaves what it sends in a mailbox, pickled, as torch would send it."""

    mailbox: list[bytes] = field(default_factory=list)

    def from_first(self, value: T) -> T:
        if self.is_first:
            self.mailbox.append(pickle.dumps(value))
        return cast(T, pickle.loads(self.mailbox[-1]))


class Unpicklable(Exception):
    """As several libraries have them: made from other arguments than the message alone."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (MemoryError("no memory"), MemoryError),
        (SafetensorError("incomplete metadata"), SafetensorError),
        (IncompatibleError("another model", found="a"), IncompatibleError),
        (Unpicklable(3, "no memory"), TrainingError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_the_first_rank_fails_by_is_raised_on_all(raised: Exception, told: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    with pytest.raises(type(raised)) as first:
        (one := OfTwo(0, 2, CPU)).made_by_first(fail)
    assert first.value is raised
    with pytest.raises(told, match=str(raised).splitlines()[0]):
        OfTwo(1, 2, CPU, one.mailbox).made_by_first(fail)
