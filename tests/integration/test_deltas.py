"""Forests whose experts hold only what changed of a base: grown, resumed, averaged, run in one memory,
expanded, exported, and refused without their base."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from btm_cluster.algorithm import Grown, branch, forest_to_come, grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import expert_request, seed_request, seed_start
from btm_cluster.errors import MissingError, PlanError, Stopped, UserError
from btm_cluster.evaluation.fitting import uniform_request
from btm_cluster.language_model.engine_opening import EngineSettings, bytes_of, open_decoder
from btm_cluster.language_model.prompts import Prompt
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import holds_weights
from btm_cluster.ledger import Artifact, Ledger, Ref, artifact_key
from btm_cluster.operations.export import Export, export
from btm_cluster.operations.plan import preview
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.steps.mixture import engine_of, mixture_of_store
from btm_cluster.steps.shared_models import SharedModels
from btm_cluster.steps.stored import open_model, open_stored, open_tokenizer, open_weights
from btm_cluster.steps.train import train
from tests.conftest import DOMAINS, in_process, plan_fields
from tests.integration.conftest import copy_store
from tests.integration.test_training import Interrupting, Undisturbed
from tests.integration.train_in_groups import Job, train_in_groups


def open_models(ledger: Ledger, models: Sequence[Ref]) -> list[PreTrainedModel]:
    """Stored models on the CPU, in float32; those of one base share its tensors."""
    shared = SharedModels(ledger)
    return [shared.open(model) for model in models]


PARTS = {"lora": {"train": "lora", "lora": {"rank": 4}}, "feed-forward": {"train": "feed-forward"}}


class Deltas:
    """A forest of two domains whose experts are deltas. Tests may add artifacts to it, no version."""

    def __init__(self, plan: Plan, driver: Driver, grown: Grown) -> None:
        self.plan, self.driver, self.grown, self.ledger = plan, driver, grown, driver.ledger

    @property
    def experts(self) -> list[Ref]:
        return [Ref("model", expert.identity) for expert in self.grown.forest.experts]

    @property
    def seed(self) -> Ref:
        return Ref("model", self.grown.forest.foundation.seed)

    def artifacts(self) -> list[Artifact]:
        return [self.ledger.get(ref) for ref in self.experts]


def branching_of(plan: Plan, part: str, **others: Any) -> Plan:
    branching = type(plan.branching).model_validate({**PARTS[part], **others})
    return plan.model_copy(update={"branching": branching})


@pytest.fixture(scope="module", params=list(PARTS))
def deltas(
    request: pytest.FixtureRequest, plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Deltas:
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp(request.param) / "store")
    plan = branching_of(plan.model_copy(update={"baselines": (), "domains": plan.domains[:2]}), request.param)
    driver = in_process(plan)
    return Deltas(plan, driver, grow(plan, driver))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(24)[None], use_cache=False).logits
    return found


def bytes_in_memory(models: Iterable[PreTrainedModel]) -> int:
    """Bytes of all storages that their parameters and buffers lie in, each once."""
    storages = (t.untyped_storage() for m in models for t in (*m.parameters(), *m.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def dtypes(weights: StoredWeights) -> set[str]:
    return {entry["dtype"] for entry in weights.header.values() if "dtype" in entry}


def test_an_expert_stores_what_changed_and_keeps_its_base_alive(deltas: Deltas) -> None:
    seed = deltas.ledger.get(deltas.seed)
    whole = seed.blob("model.safetensors").size_bytes
    for expert in deltas.artifacts():
        assert not expert.has("model.safetensors")
        assert not expert.has("optimizer.safetensors")
        (weights,) = (blob for blob in expert.blobs if blob.name.endswith(".safetensors"))
        assert weights.size_bytes < whole
        assert seed.ref in expert.needs
    assert verify(deltas.ledger).problems == ()


def test_a_plan_says_what_deltas_store(deltas: Deltas) -> None:
    steps = {step.name: step for step in preview(deltas.plan, deltas.ledger).steps}
    stored = [steps[f"expert {domain.name}"].stored_bytes for domain in deltas.plan.domains]
    sizes = [sum(b.size_bytes for b in one.blobs if "safetensors" in b.name) for one in deltas.artifacts()]
    assert stored == [pytest.approx(size, rel=0.2) for size in sizes]


def test_an_expert_that_was_stopped_ends_in_the_same_bytes(deltas: Deltas, tmp_path: Path) -> None:
    """Its checkpoints hold what is trained, too."""
    plan = copy_store(deltas.plan, tmp_path / "store")
    driver = in_process(plan)
    expected, prepared = deltas.artifacts()[0], deltas.grown.prepared
    domain = next(one for one in prepared.domains if one.name == deltas.grown.forest.domains[0])
    request = expert_request(prepared, domain, seed_start(prepared, deltas.seed))
    assert request.ref == expected.ref
    driver.ledger.storage.delete(artifact_key(request.ref))
    with pytest.raises(Stopped):
        train(request, driver.ledger, Interrupting(3))
    saved = driver.ledger.latest_training(request.ref.identity)
    assert saved is not None
    assert saved.is_delta
    assert {blob.name for blob in saved.blobs} == {
        *(blob.name for blob in expected.blobs if blob.name.endswith(".safetensors")),
        "optimizer.safetensors",
        "curve.json",
    }
    again = train(request, driver.ledger, Undisturbed())
    assert {b.name: b.sha256 for b in again.blobs} == {b.name: b.sha256 for b in expected.blobs}


def test_a_second_model_of_a_base_adds_the_bytes_of_its_change_alone(deltas: Deltas) -> None:
    first, second = open_models(deltas.ledger, deltas.experts)
    added = bytes_in_memory([first, second]) - bytes_in_memory([first])
    stored = open_stored(deltas.ledger, deltas.artifacts()[1]).header.values()
    assert added == sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for entry in stored if "dtype" in entry
    )
    assert added < bytes_in_memory([first]) / 2
    assert bytes_of([first, second]) == bytes_of([first]) + added
    # What moves or casts one moves and casts the other, and they share on.
    for model in (first, second):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert bytes_of([first, second]) == bytes_of([first]) + added // 2


def test_experts_in_one_memory_predict_as_the_whole_models_that_they_are(deltas: Deltas) -> None:
    for shared, ref in zip(open_models(deltas.ledger, deltas.experts), deltas.experts, strict=True):
        assert torch.allclose(logits(shared), logits(open_model(deltas.ledger, ref)), atol=1e-6)
        assert (logits(shared) - logits(open_model(deltas.ledger, deltas.seed))).abs().max() > 1e-3


def test_an_ensemble_of_deltas_writes_and_scores_as_one_of_whole_models(deltas: Deltas) -> None:
    mixture = mixture_of_store(deltas.ledger)
    tokenizer = open_tokenizer(deltas.ledger, mixture.tokenizer)
    whole = [open_model(deltas.ledger, ref) for ref in mixture.models.values()]
    engines = [
        engine_of(models, mixture, tokenizer, 2, "float32", "cpu")
        for models in (open_models(deltas.ledger, list(mixture.models.values())), whole)
    ]
    assert {engine.way for engine in engines} == {"rows"}
    shared, apart = (engine.memory()["weights"] for engine in engines)
    assert shared < apart
    prompts = [Prompt((5, 6, 7), most_tokens=6), Prompt((9,), most_tokens=4)]
    one, other = ([written.tokens for written in engine.generate(prompts)] for engine in engines)
    assert one == other
    one_score, other_score = (engine.score([[5, 6, 7, 8, 9, 10]])[0] for engine in engines)
    assert torch.allclose(one_score.logp_ET, other_score.logp_ET, atol=1e-5)


def test_an_ensemble_in_16_bits_holds_nothing_of_its_base_in_32(deltas: Deltas) -> None:
    """Not even what its first expert has replaced, and each delta arrives in 16 bits."""
    shared = SharedModels(deltas.ledger, dtype=torch.bfloat16)
    settings = EngineSettings(first_token=0, vocabulary=64, block_tokens=16, precision="bfloat16")
    found = []

    def opened() -> Iterator[PreTrainedModel]:
        for model in shared.open_each(deltas.experts):
            found.append({parameter.dtype for parameter in model.parameters()})
            yield model

    models, _, _ = open_decoder(opened(), settings)
    assert found == [{torch.float32}, {torch.bfloat16}]
    base = shared.find(deltas.seed)
    assert base is not None
    in_32_bits = bytes_of([SharedModels(deltas.ledger).open(deltas.seed)])
    of_base = {id(parameter) for parameter in base.parameters()}
    change = sum(p.nbytes for p in models[1].parameters() if id(p) not in of_base)
    assert bytes_of([base]) == in_32_bits // 2
    assert bytes_of([base, *models]) == in_32_bits // 2 + 2 * change


def test_a_new_version_shares_the_base_of_the_one_before(deltas: Deltas) -> None:
    before, after = SharedModels(deltas.ledger), SharedModels(deltas.ledger)
    kept, (first, second) = before.open(deltas.experts[0]), deltas.experts
    assert after.open(first, before) is kept
    new = after.open(second, before)
    unshared = bytes_in_memory([kept, new]) - bytes_in_memory([kept])
    assert unshared < bytes_in_memory([kept]) / 2
    assert after.find(deltas.seed) is before.find(deltas.seed)


def test_models_larger_than_the_free_memory_are_refused_before_one_is_read_their_base_counted_once(
    deltas: Deltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "btm_cluster.steps.shared_models"
    files = [deltas.ledger.get(deltas.seed), *deltas.artifacts()]
    weights = [b.size_bytes for one in files for b in one.blobs if holds_weights(b.name)]
    assert len(weights) == 3
    monkeypatch.setattr(f"{module}.free_memory", lambda _: sum(weights))
    loaded = SharedModels(deltas.ledger)
    assert len(list(loaded.open_each(deltas.experts))) == 2
    monkeypatch.setattr(f"{module}.free_memory", lambda _: 1000)
    assert (
        len(list(SharedModels(deltas.ledger).open_each(deltas.experts, loaded))) == 2
    )  # nothing is read anew
    monkeypatch.setattr(f"{module}.open_model", None)
    with pytest.raises(
        UserError, match=r"(?s)do not fit the free memory of this machine.*2 models in float32"
    ):
        next(SharedModels(deltas.ledger).open_each(deltas.experts))


def test_an_average_of_deltas_is_an_ordinary_model_of_their_mean(deltas: Deltas) -> None:
    (average,) = deltas.driver.require([uniform_request(tuple(deltas.experts))])
    assert not average.is_delta
    made = load_file(deltas.ledger.open_file(average, "model.safetensors"))
    parts = [open_weights(deltas.ledger, one) for one in deltas.artifacts()]
    for name, tensor in made.items():
        mean = torch.stack([part.read(name) for part in parts]).double().mean(0)
        assert torch.allclose(tensor.double(), mean, atol=1e-6), name


@pytest.mark.parametrize("part", PARTS)
def test_a_forest_that_is_stored_in_16_bits_has_such_deltas(
    part: str, plan_with_blocks: Plan, tmp_path: Path
) -> None:
    plan = copy_store(plan_with_blocks, tmp_path / "store")
    training = plan.training.model_copy(update={"weights": "bfloat16"})
    plan = plan.model_copy(update={"baselines": (), "domains": plan.domains[:2], "training": training})
    driver = in_process(plan := branching_of(plan, part))
    experts = grow(plan, driver).forest.experts
    refs = [Ref("model", expert.identity) for expert in experts]
    models = [driver.ledger.get(ref) for ref in refs]
    assert dtypes(open_stored(driver.ledger, models[0])) == ({"F32"} if part == "lora" else {"BF16"})
    (shared, _) = open_models(driver.ledger, refs)
    assert torch.allclose(logits(shared), logits(open_model(driver.ledger, refs[0])), atol=1e-6)
    (average,) = driver.require([uniform_request(tuple(refs))])
    made = open_weights(driver.ledger, average)
    assert dtypes(made) == {"BF16"}
    name = "transformer.h.0.mlp.c_fc.weight"
    mean = torch.stack([open_weights(driver.ledger, one).read(name).float() for one in models]).mean(0)
    assert torch.allclose(made.read(name).float(), mean, rtol=2**-8)
    is_adapter = part == "lora"
    export(Export(tmp_path / "made", expert=experts[0].domain, adapter=is_adapter), None, driver)
    assert ("rounded to bfloat16" in (tmp_path / "made" / "README.md").read_text()) is not is_adapter


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it
def test_an_expert_is_exported_whole_and_a_lora_also_as_an_adapter(deltas: Deltas, tmp_path: Path) -> None:
    domain, ref = deltas.grown.forest.experts[0].domain, deltas.experts[0]
    export(Export(tmp_path / "seed", seed=True), None, deltas.driver)
    export(Export(tmp_path / "whole", expert=domain), None, deltas.driver)
    expected = logits(open_model(deltas.ledger, ref))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(whole), expected, atol=1e-6)
    adapter = Export(tmp_path / "adapter", expert=domain, adapter=True)
    if deltas.plan.branching.train != "lora":
        with pytest.raises(UserError, match="has no adapter to export"):
            export(adapter, None, deltas.driver)
        return
    export(adapter, None, deltas.driver)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "seed")
    assert torch.allclose(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected, atol=1e-6)


def test_a_later_domain_starts_from_the_base_and_from_an_average_where_that_is_asked(
    deltas: Deltas, texts: dict[str, Path], tmp_path: Path
) -> None:
    plan = copy_store(deltas.plan, tmp_path / "store")
    fields = plan_fields(texts, tmp_path / "store")
    third = plan.model_copy(update={"domains": Plan.model_validate(fields).domains})
    part = plan.branching.train
    averaged = branching_of(third, part, start="uniform")
    for later, is_average in ((third, False), (averaged, True)):
        driver = in_process(later)
        prepared = prepare(later, driver)
        forest = driver.ledger.log.newest()
        assert forest is not None
        # Founding domains go back to the seed: a later one is none of them.
        prepared = replace(prepared, founders=prepared.founders[:2])
        (request,) = branch(prepared, forest, driver)
        assert request.trains.part == part
        assert request.start is not None
        start = driver.ledger.get(request.start.model)
        assert (start.facts["role"] == "average") == is_average
        driver.ledger.storage.erase("expansions/")
        assert [e.domain for e in forest_to_come(prepared, forest, [request]).experts] == sorted(DOMAINS)


def test_a_delta_whose_base_is_gone_is_one_clear_error(deltas: Deltas, tmp_path: Path) -> None:
    plan = copy_store(deltas.plan, tmp_path / "store")
    ledger = in_process(plan).ledger
    ledger.storage.delete(artifact_key(deltas.seed))
    for opens in (lambda: open_models(ledger, deltas.experts), lambda: open_model(ledger, deltas.experts[0])):
        with pytest.raises(MissingError, match="holds only what changed of its base") as refused:
            opens()
        assert refused.value.found == "the base is not in the store"
    assert any(deltas.seed.identity[:12] in problem for problem in verify(ledger).problems)


def test_a_wrong_adapter_is_refused_before_a_text_is_read(fields: dict[str, Any]) -> None:
    branching = {"train": "lora", "lora": {"modules": ["q_proj"]}}
    driver = in_process(plan := Plan.model_validate(fields | {"branching": branching}))
    with pytest.raises(PlanError, match="names no linear layer"):
        grow(plan, driver)
    assert not driver.made


def test_a_group_trains_the_adapter_of_one_process(texts: dict[str, Path], tmp_path: Path) -> None:
    fields = plan_fields(texts, tmp_path / "store")
    fields |= {"targets": [], "branching": PARTS["lora"]}
    fields["training"] |= {"learning_rate": 0.05, "epsilon": 1.0, "gradient_clip": 0.5}
    plan = Plan.model_validate(fields)
    driver = in_process(plan)
    prepared = prepare(plan, driver)
    train(seed_request(prepared), driver.ledger, Undisturbed())
    grouped = copy_store(plan, tmp_path / "group").store
    request = expert_request(prepared, prepared.domains[0], seed_start(prepared, seed_request(prepared).ref))
    alone = train(request, driver.ledger, Undisturbed())
    in_group = Job(fields | {"store": grouped}, "expert", ranks=2)
    # Each rank with a whole model until it is stopped, and then with a half of one.
    train_in_groups([replace(in_group, stop_after=2), replace(in_group, how={"sharding": "full"})])
    ledger = Ledger.open(grouped)
    found, expected = (
        open_stored(one, two) for one, two in ((ledger, ledger.get(request.ref)), (driver.ledger, alone))
    )
    changes = [expected.read(name).abs().max() for name in expected.header if name.endswith("lora_B.weight")]
    assert max(changes) > 1e-3
    for name in (name for name in expected.header if name != "__metadata__"):
        assert (found.read(name) - expected.read(name)).abs().max() < 1e-4, name
