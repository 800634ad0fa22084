"""A forest whose models are stored in bfloat16 and in shards is the float32 one, rounded: from training to the
folder that transformers opens."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from btm_cluster.algorithm import Grown, grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.recipes import transformer_lm_request
from btm_cluster.errors import IncompatibleError, MissingError
from btm_cluster.language_model import stored_weights
from btm_cluster.language_model.stored_weights import StoredWeights, tensors_of
from btm_cluster.language_model.tensor_files import INDEX, header_of, names_in_order, write_tensors
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.operations.export import mergekit_text
from btm_cluster.operations.model_folder import ForestModel, write_folder
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests import AverageRequest, TaskVectorRequest, TrainRequest
from btm_cluster.steps.stored import open_model, open_weights
from tests.conftest import in_process, run_all
from tests.integration.conftest import PreparedStore, copy_store
from tests.integration.test_training import Interrupting, MachineDied, run, weights_of
from tests.made import origin

SHARD_BYTES = 20_000
Forest = tuple[Driver, Grown]


@pytest.fixture(scope="module")
def whole(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> Forest:
    """A forest as it is stored by default."""
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("whole") / "store")
    driver = in_process(plan)
    return driver, grow(with_demix(plan), driver)


@pytest.fixture(scope="module")
def rounded(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forest]:
    """The same forest in bfloat16, each model in several shards."""
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("rounded") / "store")
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"weights": "bfloat16"})})
    driver = in_process(plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_weights, "SHARD_BYTES", SHARD_BYTES)
        yield driver, grow(with_demix(plan), driver)


def with_demix(plan: Plan) -> Plan:
    return plan.model_copy(update={"baselines": ("transformer-lm", "demix")})


def trained(forest: Forest) -> dict[str, Artifact]:
    """Trained weights by name."""
    driver, grown = forest
    assert grown.baseline is not None
    refs = {expert.domain: Ref("model", expert.identity) for expert in grown.forest.experts}
    refs |= {"seed": Ref("model", grown.forest.foundation.seed), "transformer-lm": grown.baseline}
    refs |= {f"demix {number}": ref for number, ref in enumerate(grown.demix)}
    return {name: driver.ledger.get(ref) for name, ref in refs.items()}


def types(weights: StoredWeights) -> set[str]:
    return {weights.header[name]["dtype"] for name in names_in_order(weights.header)}


def test_what_is_stored_is_what_was_trained_in_float32_rounded_once(whole: Forest, rounded: Forest) -> None:
    for (name, model), exact in zip(trained(rounded).items(), trained(whole).values(), strict=True):
        weights, expected = (open_weights(f[0].ledger, m) for f, m in ((rounded, model), (whole, exact)))
        assert model.has(INDEX), name
        assert types(weights) == {"BF16"}
        assert types(expected) == {"F32"}
        for tensor, stored in tensors_of(expected):
            assert torch.equal(weights.read(tensor), stored.bfloat16()), (name, tensor)
    assert not verify(rounded[0].ledger).problems


def test_a_training_that_goes_on_from_a_seed_in_bfloat16_ends_as_one_that_was_not_interrupted(
    rounded: Forest, prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "SHARD_BYTES", SHARD_BYTES)
    driver, grown = rounded
    request: TrainRequest = transformer_lm_request(grown.prepared, trained(rounded)["seed"].ref)
    with pytest.raises(MachineDied):
        run(prepared_store, replace(request, snapshots=()), Interrupting(8, dies=True))
    assert prepared_store.driver.ledger.latest_training(request.ref.identity) is None
    assert weights_of(run(prepared_store, request)) == weights_of(trained(rounded)["transformer-lm"])
    for one in request.at_snapshots:
        assert prepared_store.driver.ledger.get(one.ref).blobs == driver.ledger.get(one.ref).blobs


def test_averages_are_summed_in_float32_and_stored_as_their_models_are(rounded: Forest) -> None:
    ledger = rounded[0].ledger
    weights = dict(zip(trained(rounded), (0.5, 0.3, 0.2), strict=False))
    models = trained(rounded)
    refs = tuple(models[name].ref for name in weights)
    average, merged = run_all(
        rounded[0].workers,
        [
            AverageRequest("average", refs, tuple(weights.values())),
            TaskVectorRequest("ties", refs, models["seed"].ref, "ties", 1.0, 0.2),
        ],
    )
    assert isinstance(average, Artifact)
    assert isinstance(merged, Artifact)
    assert types(open_weights(ledger, merged)) == {"BF16"}
    folders = {ref.identity: "folder" for ref in refs}
    assert "out_dtype: bfloat16" in mergekit_text(average, folders, "bfloat16")
    found = open_weights(ledger, average)
    assert types(found) == {"BF16"}
    parts = [
        (open_weights(ledger, ledger.get(ref)), weight)
        for ref, weight in zip(refs, weights.values(), strict=True)
    ]
    for name, tensor in tensors_of(found):
        exact = sum(weight * part.read(name).double() for part, weight in parts)
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-8, atol=1e-6)


def test_an_exported_folder_opens_in_transformers_as_it_is_stored(rounded: Forest, tmp_path: Path) -> None:
    driver, grown = rounded
    for name, model in list(trained(rounded).items())[:2]:
        write_folder(
            driver.ledger, grown.forest, "tiny", ForestModel(name, model), tmp_path / name, SHARD_BYTES
        )
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
        assert "rounded to bfloat16" in (tmp_path / name / "README.md").read_text()
        opened, loading = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not loading["missing_keys"]
        assert opened.dtype == torch.bfloat16
        ours, block = open_model(driver.ledger, model), torch.arange(32)[None]
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        logits = (one.eval()(input_ids=block).logits for one in (opened.float(), ours))
        torch.testing.assert_close(*logits, rtol=0, atol=0)


def committed(ledger: Ledger, files: dict[str, Path]) -> Artifact:
    return ledger.commit(origin("model", {"files": sorted(files)}), files, {"role": "expert"})


def test_an_index_that_names_a_lost_shard_is_one_error(rounded: Forest) -> None:
    ledger, model = rounded[0].ledger, trained(rounded)["seed"]
    files = {blob.name: ledger.open_file(model, blob.name) for blob in model.blobs}
    lost = next(name for name in files if name.startswith("model-00002"))
    del files[lost]
    with pytest.raises(MissingError, match=lost) as refused:
        open_weights(ledger, committed(ledger, files))
    assert refused.value.remedy


def test_shards_of_several_types_are_one_error(whole: Forest, rounded: Forest, tmp_path: Path) -> None:
    ledger, model = rounded[0].ledger, trained(rounded)["seed"]
    exact = open_weights(whole[0].ledger, trained(whole)["seed"])
    files = {blob.name: ledger.open_file(model, blob.name) for blob in model.blobs}
    shards = sorted(name for name in files if "-of-" in name)
    index = json.loads(files[INDEX].read_text())["weight_map"]
    header = {name: exact.header[name] for name, shard in index.items() if shard == shards[1]}
    write_tensors(header_of(header, header), ((n, exact.read(n)) for n in header), tmp_path / "shard")
    with pytest.raises(IncompatibleError, match="several dtypes") as refused:
        open_model(ledger, committed(ledger, files | {shards[1]: tmp_path / "shard"}))
    assert "BF16" in refused.value.found
    assert "F32" in refused.value.found
