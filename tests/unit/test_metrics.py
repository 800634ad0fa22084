"""What a driver tells Prometheus of a training: while it waits, while it trains,
while it is silent, and after its end."""

import dataclasses
from pathlib import Path

import pytest

from btm_cluster.equations.budget import training_flops_per_token
from btm_cluster.errors import StoreError
from btm_cluster.language_model.demix import split_feed_forwards
from btm_cluster.language_model.model import build_model
from btm_cluster.language_model.utilisation import peak_flops, utilisation
from btm_cluster.requests import Resources
from btm_cluster.requests.progress import Progress
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.storage.store_calls import take_store_calls
from btm_cluster.workers.on_ray.metrics import LINGER_SECONDS, Watched, shown


def test_a_training_that_waits_shows_how_long_and_is_not_called_silent() -> None:
    values = Watched("expert", asked=100).values(now=160)
    assert (values["waiting"], values["queue_wait_seconds"], values["seconds_since_update"]) == (1, 60, 0)


def test_a_training_that_began_keeps_its_wait_and_counts_its_silence() -> None:
    values = Watched("expert", asked=100, begun=130, heard=150).values(now=160)
    assert (values["waiting"], values["queue_wait_seconds"], values["seconds_since_update"]) == (0, 30, 10)


def test_a_training_that_ended_is_neither_silent_nor_waiting_and_is_forgotten_in_time() -> None:
    ended = Watched("expert", asked=100, begun=130, heard=150, ended=155, said={"loss": 2.0})
    values = ended.values(now=160)
    assert (values["waiting"], values["seconds_since_update"], values["loss"]) == (0, 0, 2.0)
    assert ended.values(now=156 + LINGER_SECONDS) == {}
    never_begun = Watched("expert", asked=100, ended=110)
    assert never_begun.values(now=120)["queue_wait_seconds"] == 10


def test_a_sign_of_life_without_a_loss_moves_no_curve() -> None:
    assert shown(Progress("kitchen", "storing")) == {}
    told = shown(Progress("kitchen", "training", 6, 12, loss=3.0, tokens_per_second=100.0, mfu=0.4))
    assert told == {"updates": 6, "updates_wanted": 12, "loss": 3.0, "tokens_per_second": 100.0, "mfu": 0.4}


def test_utilisation_is_flops_done_by_flops_there_are_and_of_a_share_of_a_gpu_its_share() -> None:
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "vocab_size": 300,
        "n_positions": 32,
    }
    model = build_model(config, 0)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = 6 * parameters + 12 * 2 * 32 * 32
    assert training_flops_per_token(parameters, 2, 32, 32) == flops
    how = Resources(2, 1.0, 1, 4, "bfloat16", compile=False)
    assert utilisation(model, how, 32, 1e6, "NVIDIA H200") == pytest.approx(1e6 * flops / (2 * 989e12))
    quarter = dataclasses.replace(how, workers=1, gpus_per_worker=0.25)
    assert utilisation(model, quarter, 32, 1e6, "NVIDIA H200") == pytest.approx(1e6 * flops / (0.25 * 989e12))


def test_of_a_demix_a_token_takes_the_feed_forwards_of_one_domain() -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 300}
    how = Resources(1, 1.0, 1, 4, "bfloat16", compile=False)
    dense, demix = (build_model(config, 0) for _ in range(2))
    split_feed_forwards(demix, range(3))
    assert sum(p.numel() for p in demix.parameters()) > sum(p.numel() for p in dense.parameters())
    found = [utilisation(model, how, 32, 1e6, "NVIDIA H200") for model in (dense, demix)]
    assert found[0] == found[1]


def test_where_the_peak_is_not_known_there_is_no_utilisation() -> None:
    how = Resources(1, 1.0, 1, 4, "bfloat16", compile=False)
    model = build_model({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 300}, 0)
    assert utilisation(model, how, 32, 1e6, "NVIDIA Something New") is None
    assert utilisation(model, dataclasses.replace(how, precision="float32"), 32, 1e6, "NVIDIA H200") is None
    assert utilisation(model, dataclasses.replace(how, gpus_per_worker=0.0), 32, 1e6, "cpu") is None
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12


def test_requests_are_counted_by_verb_and_outcome_until_they_are_taken(tmp_path: Path) -> None:
    store = LocalFolder(str(tmp_path))
    take_store_calls()
    assert store.create("a/b", b"x")
    assert store.read("a/b") == b"x"
    with pytest.raises(StoreError):
        store.read("none")
    with pytest.raises(StoreError):
        store.create("a/b/c", b"x")  # below a file
    assert take_store_calls() == {("create", "done"): 1, ("read", "done"): 2, ("create", "failed"): 1}
    assert take_store_calls() == {}
