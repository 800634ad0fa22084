"""Groups whose ranks hold a share each of model, gradients and moments: they train the model of one process, and go
on from each other's checkpoints."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btm_cluster.driver.gpu_memory import training_memory
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import (
    expert_resources,
    seed_request,
    seed_resources,
    transformer_lm_request,
)
from btm_cluster.errors import ResourcesError
from btm_cluster.language_model.process_group import ProcessGroup
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.curves import read_curve
from btm_cluster.plan import Lora, Plan, Trains
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.steps.settling import settled, settled_for
from btm_cluster.steps.train import train
from tests.conftest import in_process, plan_fields
from tests.integration.conftest import PreparedStore
from tests.integration.test_training import Undisturbed
from tests.integration.train_in_groups import Job, train_in_groups

WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"


def sharded_fields(texts: dict[str, Path], store: Path) -> dict[str, Any]:
    """A plan of a model with two embedding matrices, whose training shows the scale of every gradient, as Adam's
    own small epsilon would not. On two ranks an update has more passes on one than on the other; of some
    matrices there is no row left for the third rank. Models are stored in bfloat16, so that a seed's optimiser holds
    its weights too."""
    fields = plan_fields(texts, store)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, **heads}
    fields["model"] = {"config": {"model_type": "llama", **sizes}}
    own_scale = {"learning_rate": 0.5, "epsilon": 1.0, "gradient_clip": 0.5}
    fields["training"] |= {"blocks_per_domain_update": 3, "weights": "bfloat16", **own_scale}
    fields["cluster"]["micro_batch_blocks"] = 2
    return fields | {"baselines": ["transformer-lm"]}


@dataclass(frozen=True)
class Made:
    """A Transformer-LM, with the seed on its way."""

    request: TrainRequest
    ledger: Ledger

    def files(self) -> list[bytes]:
        """Weights of the seed, which has an optimiser, and of the finished model."""
        seed, whole = self.ledger.get(self.request.until(6).ref), self.ledger.get(self.request.ref)
        places = [(seed, WEIGHTS), (seed, MOMENTS), (whole, WEIGHTS)]
        return [self.ledger.open_file(model, name).read_bytes() for model, name in places]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.ledger.open_file(self.ledger.get(self.request.ref), WEIGHTS))

    def curve(self) -> list[list[float]]:
        curve = read_curve(self.ledger, self.ledger.get(self.request.ref))
        assert curve is not None
        looks = curve.development
        return [curve.updates, curve.loss, curve.gradient_norm, looks.updates, looks.loss]

    def groups(self) -> list[tuple[int, str]]:
        """Workers and sharding of each span of updates."""
        profile = self.ledger.get(self.request.ref).facts["profile"]
        spans = profile if isinstance(profile, list) else [profile]
        return [(span["workers"], span.get("sharding", "none")) for span in spans]


def test_what_a_plan_leaves_open_is_settled_by_the_memory_that_is_there(
    prepared_store: PreparedStore,
) -> None:
    on_gpus = {"seed_gpus": 2, "gpus_per_expert": 1}
    plan = prepared_store.prepared.plan
    plan = plan.model_copy(update={"cluster": plan.cluster.model_copy(update=on_gpus)})
    seed = replace(prepared_store.seed, how=seed_resources(plan))
    assert (seed.how.sharding, seed.how.activation_checkpointing) == ("auto", "auto")
    assert expert_resources(plan).sharding == "none", "one GPU has nothing to share"
    plenty = settled_for(seed, 1e12).how
    scarce = settled_for(seed, least := least_of(seed)).how
    assert (plenty.sharding, plenty.activation_checkpointing) == ("none", "off")
    assert (scarce.sharding, scarce.activation_checkpointing) == ("full", "on")
    assert {"sharding", "activation_checkpointing"}.isdisjoint(plenty.facts), "as before there was a choice"
    assert Resources(**scarce.facts) == scarce
    on_cpu = ProcessGroup(0, 2, torch.device("cpu"))
    assert settled(seed, on_cpu).how == plenty
    assert settled(replace(seed, how=scarce), on_cpu).how == scarce, "what is written is done"
    with pytest.raises(ResourcesError, match="seed does not fit the memory of its GPUs"):
        settled_for(seed, 0.95 * least)
    a_tenth = replace(seed, how=replace(seed.how, workers=1, gpus_per_worker=0.1))
    assert settled_for(a_tenth, 2 * least_of(a_tenth)).how.activation_checkpointing == "on", (
        "counting on a tenth of it"
    )
    left_open = replace(seed, how=replace(seed.how, micro_batch_blocks="auto"))
    assert settled_for(left_open, 1e12).how.micro_batch_blocks == -(
        -seed.blocks_per_update // seed.how.workers
    )
    settled_for(replace(seed, trains=Trains("lora", Lora(2, 4.0, ("c_attn",)))), 0.95 * least)


def least_of(request: TrainRequest) -> float:
    """Bytes that it takes on each GPU with all that saves memory."""
    memory = training_memory(request)
    assert memory is not None
    return memory.memory(1.0).peak


def test_sharded_groups_train_the_model_of_one_process_and_go_on_from_each_others_checkpoints(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    store = tmp_path / "alone"
    driver = in_process(plan := Plan.model_validate(sharded_fields(texts, store)))
    prepared = prepare(plan, driver)
    request = transformer_lm_request(prepared, seed_request(prepared).ref)
    for name in ("undisturbed", "stopped", "recomputed", "grown", "shrunk"):
        shutil.copytree(store, tmp_path / name)

    def job(name: str, ranks: int, sharding: str, stop_after: int | None = None, **how: Any) -> Job:
        fields = sharded_fields(texts, tmp_path / name)
        return Job(fields, "transformer-lm", ranks, stop_after, {"sharding": sharding, **how})

    train_in_groups(
        [
            job("undisturbed", 2, "full"),
            job("stopped", 2, "full", stop_after=2),
            job("stopped", 2, "full"),
            job("recomputed", 2, "full", activation_checkpointing="on"),
            job("grown", 2, "none", stop_after=2),
            job("grown", 3, "full"),
            job("shrunk", 3, "full", stop_after=2),
            job("shrunk", 1, "none"),
        ]
    )
    train(request, driver.ledger, Undisturbed())
    made = {folder.name: Made(request, Ledger.open(str(folder))) for folder in tmp_path.iterdir()}
    assert made["undisturbed"].groups() == [(2, "full")]
    assert made["grown"].groups() == [(2, "none"), (3, "full")]
    assert made["shrunk"].groups() == [(3, "full"), (1, "none")]
    assert made["stopped"].files() == made["recomputed"].files() == made["undisturbed"].files()
    alone = made.pop("alone")
    for name, other in made.items():
        assert other.curve() == [pytest.approx(values, rel=1e-3) for values in alone.curve()], name
        torch.testing.assert_close(other.tensors(), alone.tensors(), rtol=0.01, atol=1e-4)
