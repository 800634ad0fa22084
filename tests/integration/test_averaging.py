"""Averages against float64 arithmetic, as files that others open, within
bounded memory; and what is refused."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from btm_cluster.data.tokenizer import TOKENIZER_FILES
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Failure
from btm_cluster.equations.averaging import argmax_weights, posterior_weights, uniform_weights
from btm_cluster.equations.posterior import log_prior
from btm_cluster.errors import IncompatibleError
from btm_cluster.evaluation.evaluate import evaluate, forest_ensemble
from btm_cluster.evaluation.fitting import averaged_starts
from btm_cluster.evaluation.scoring import score_models, stack_of
from btm_cluster.language_model.averaging import average_models
from btm_cluster.language_model.stored_weights import TensorFiles, tensors_of
from btm_cluster.language_model.tensor_files import read_header, write_tensors
from btm_cluster.ledger import Artifact, Ledger, Origin, Ref, artifact_key, blob_key
from btm_cluster.mixing.fitting import FULL
from btm_cluster.plan import MergingPlan, Plan
from btm_cluster.requests import AverageRequest
from btm_cluster.steps import average
from btm_cluster.steps.average import check_compatible
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.workers.in_process import InProcess, LocalControl
from tests.conftest import in_process, run_all
from tests.integration.conftest import GrownForest, copy_store
from tests.made import origin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "scalar": (),
    "one": (1,),
    "none": (0, 3),
    "vector": (7,),
    "odd": (3, 5, 7),
    "matrix": (33, 65),
    "thin": (1, 1, 129),
}
WEIGHTS = [0.5, 0.3, 0.2]


Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def made_up_model(dtype: torch.dtype, random_seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(random_seed)
    return {
        name: (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(
            dtype
        )
        for name, shape in SHAPES.items()
    }


def write_average(files: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    average = average_models([TensorFiles([file]) for file in files], weights)
    write_tensors(average.header, tensors_of(average), target)


def check_is_average(found: torch.Tensor, tensors: list[torch.Tensor], weights: list[float]) -> None:
    """Rounded once to its own dtype, after a sum whose terms each cost at most a float32 rounding."""
    terms = [weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)]
    exact, size = sum(terms), sum(term.abs() for term in terms)
    kind = torch.finfo(found.dtype)
    rounding = kind.eps / 2 * exact.abs() + kind.smallest_normal * kind.eps
    assert found.dtype == tensors[0].dtype
    assert found.shape == tensors[0].shape
    assert ((found.double() - exact).abs() <= 1.001 * rounding + (len(terms) + 2) * 2**-24 * size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_average_of_files_is_the_float64_average_to_its_dtypes_rounding(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    models = [made_up_model(dtype, seed) for seed in range(3)]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for model, file in zip(models, files, strict=True):
        save_file(model, file, metadata={"format": "pt"})
    write_average(files, WEIGHTS, tmp_path / "average.safetensors")
    found = load_file(tmp_path / "average.safetensors")
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        check_is_average(tensor, [model[name] for model in models], WEIGHTS)
    assert read_header(tmp_path / "average.safetensors")["__metadata__"] == {"format": "pt"}


def test_half_precision_weights_are_summed_in_float32(tmp_path: Path) -> None:
    # Summed in float16, a thousandth of 1 added to 1 a thousand times over would be lost each time.
    save_file({"t": torch.full((2,), 1.0, dtype=torch.float16)}, tmp_path / "one")
    save_file({"t": torch.full((2,), 0.25, dtype=torch.float16)}, tmp_path / "quarter")
    models = [TensorFiles([tmp_path / "one"])] + [TensorFiles([tmp_path / "quarter"])] * 1000
    found = average_models(models, [1.0] + [0.001] * 1000).read("t").half()
    assert found.tolist() == [1.25, 1.25]


def test_models_of_several_precisions_are_averaged_in_float32_and_stored_in_the_widest(
    tmp_path: Path,
) -> None:
    files, models = [tmp_path / "half", tmp_path / "whole"], [made_up_model(d, 0) for d in DTYPES[:2]]
    for model, file in zip(models, files, strict=True):
        save_file(model, file)
    for order in (files, files[::-1]):
        write_average(order, [0.5, 0.5], tmp_path / "average.safetensors")
        for name, found in load_file(tmp_path / "average.safetensors").items():
            assert found.dtype == torch.float32
            check_is_average(found, [model[name].float() for model in models], [0.5, 0.5])


def test_one_hot_weights_give_that_model_bit_for_bit(tmp_path: Path) -> None:
    for dtype in DTYPES:
        models = [made_up_model(dtype, seed) for seed in range(3)]
        files = [tmp_path / f"{i}.safetensors" for i in range(3)]
        for model, file in zip(models, files, strict=True):
            save_file(model, file, metadata={"format": "pt"})
        write_average(files, [0.0, 1.0, 0.0], tmp_path / "average.safetensors")
        assert (tmp_path / "average.safetensors").read_bytes() == files[1].read_bytes()


def write_backwards(model: Mapping[str, torch.Tensor], file: Path) -> None:
    """The same float32 tensors as a safetensors file in another order, written by
    hand from the format's description."""
    header, data = {}, b""
    for name in sorted(model, reverse=True):
        raw = model[name].contiguous().numpy().tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(model[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def test_tensors_are_matched_by_name_wherever_they_lie_in_a_file(tmp_path: Path) -> None:
    models = [made_up_model(torch.float32, seed) for seed in range(2)]
    save_file(models[0], tmp_path / "0.safetensors")
    write_backwards(models[1], tmp_path / "1.safetensors")
    for order in ([0, 1], [1, 0]):
        files = [tmp_path / f"{i}.safetensors" for i in order]
        write_average(files, [0.25, 0.75], tmp_path / "average.safetensors")
        for name, tensor in load_file(tmp_path / "average.safetensors").items():
            check_is_average(tensor, [models[i][name] for i in order], [0.25, 0.75])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m | {"odd": torch.zeros(3, 5, 8)}, "odd"),
        (lambda m: m | {"vector": m["vector"].int()}, "vector"),
        (lambda m: m | {"more": torch.zeros(2)}, "more"),
        (lambda m: {name: t for name, t in m.items() if name != "matrix"}, "matrix"),
    ],
    ids=["shape", "dtype", "one tensor more", "one tensor less"],
)
def test_other_tensors_are_refused_from_the_headers_alone(change: Change, named: str, tmp_path: Path) -> None:
    model = made_up_model(torch.float32, 0)
    for name, tensors in (("a", model), ("b", change(model))):
        save_file(tensors, tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (header,) = struct.unpack("<Q", whole[:8])
        (tmp_path / name).write_bytes(whole[: 8 + header])  # no weight is there to be read
    with pytest.raises(IncompatibleError) as refused:
        write_average([tmp_path / "a", tmp_path / "b"], [0.5, 0.5], tmp_path / "average.safetensors")
    assert refused.value.found.startswith(named)
    assert refused.value.expected.startswith(named)
    assert not (tmp_path / "average.safetensors").exists()


# Weights


def test_uniform_weights_are_one_over_k() -> None:
    for k in (1, 2, 3, 64):
        assert uniform_weights(k) == [1 / k] * k


def test_argmax_weights_are_one_hot_at_the_largest_prior() -> None:
    assert argmax_weights(torch.tensor([0.2, 0.5, 0.3])) == [0.0, 1.0, 0.0]
    assert argmax_weights(torch.tensor([1.0])) == [1.0]


@pytest.mark.parametrize("experts", [1, 2, 3, 17, 64])
def test_posterior_weights_are_the_prior_to_six_digits_and_sum_to_one(experts: int) -> None:
    for seed in range(20):
        prior_E = torch.softmax(
            5 * torch.randn(experts, generator=torch.Generator().manual_seed(seed)).double(), dim=0
        )
        weights = posterior_weights(prior_E)
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
        assert min(weights) >= 0
        assert weights == [round(weight, 6) for weight in weights]
        torch.testing.assert_close(torch.tensor(weights).double(), prior_E, rtol=0, atol=experts * 5e-7)
        assert posterior_weights(prior_E * (1 + 1e-12)) == weights


# In a forest


def files_of(driver: Driver, model: Artifact) -> dict[str, Path]:
    return {blob.name: driver.ledger.open_file(model, blob.name) for blob in model.blobs}


@pytest.mark.parametrize("label", ["uniform", "posterior for market"])
def test_a_forests_average_is_that_of_its_experts_weights(grown: GrownForest, label: str) -> None:
    ledger = grown.driver.ledger
    average = ledger.get(grown.averages[label])
    weights = average.facts["weights"]
    parents = [expert for expert in grown.experts if expert.identity in weights]
    assert sum(weights.values()) == pytest.approx(1)
    assert len(parents) == len(weights) > 1
    tensors = [load_file(ledger.open_file(parent, "model.safetensors")) for parent in parents]
    for name, found in load_file(ledger.open_file(average, "model.safetensors")).items():
        check_is_average(found, [t[name] for t in tensors], [weights[parent.identity] for parent in parents])


def test_a_forests_average_opens_in_transformers_with_the_very_same_weights(
    grown: GrownForest, tmp_path: Path
) -> None:
    average = grown.driver.ledger.get(grown.averages["uniform"])
    for name in ("config.json", "model.safetensors", *TOKENIZER_FILES):
        shutil.copyfile(grown.driver.ledger.open_file(average, name), tmp_path / name)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    read = tokenizer("harbour", return_tensors="pt").input_ids
    assert torch.isfinite(model(input_ids=read).logits).all()
    written = model.generate(read, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert read.shape[1] < written.shape[1] <= read.shape[1] + 4


@pytest.fixture
def store(grown: GrownForest, tmp_path: Path) -> Driver:
    """A copy of the grown forest's store, to be changed."""
    return in_process(copy_store(grown.prepared.plan, tmp_path / "store"))


def lose_weights(driver: Driver, *models: Artifact) -> None:
    """Deletes the weights from the store, so that reading them would be another error."""
    for model in models:
        driver.ledger.storage.delete(f"blobs/{model.blob('model.safetensors').sha256}")


def further(model: Artifact) -> Origin:
    """A model that was trained further than another."""
    return origin("model", {**model.recipe, "last_update": 10**6}, model.inputs)


def request_for(*models: Artifact) -> AverageRequest:
    return AverageRequest("average", tuple(m.ref for m in models), (1 / len(models),) * len(models))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_another_architecture_or_tokenizer_is_refused_before_a_weight_is_read(
    grown: GrownForest, store: Driver, name: str, tmp_path: Path
) -> None:
    expert = grown.experts[0]
    files = files_of(store, expert)
    changed = json.loads(files[name].read_text()) | {"a field": "of another"}
    (tmp_path / name).write_text(json.dumps(changed))
    other = store.ledger.commit(further(expert), files | {name: tmp_path / name}, expert.facts)
    lose_weights(store, expert)
    with pytest.raises(IncompatibleError) as refused:
        run_all(store.workers, [request_for(expert, other)])
    assert name in refused.value.found


def test_models_that_two_versions_of_transformers_wrote_can_be_averaged(
    grown: GrownForest, store: Driver, tmp_path: Path
) -> None:
    expert = grown.experts[0]
    files = files_of(store, expert)
    config = json.loads(files["config.json"].read_text())
    assert "transformers_version" not in config
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "5.1.0"}))
    older = files | {"config.json": tmp_path / "config.json"}
    other = store.ledger.commit(further(expert), older, expert.facts)
    assert isinstance(run_all(store.workers, [request_for(expert, other)])[0], Artifact)


def test_models_of_two_seeds_are_refused_before_a_weight_is_read(grown: GrownForest, store: Driver) -> None:
    expert = grown.experts[0]
    files = files_of(store, expert)
    another_seed = expert.facts | {"origin": "0123456789abcdef" * 4}
    stranger = store.ledger.commit(further(expert), files, another_seed)
    lose_weights(store, expert)
    with pytest.raises(IncompatibleError) as refused:
        run_all(store.workers, [request_for(expert, stranger)])
    assert {refused.value.found[-12:], refused.value.expected[-12:]} == {
        "0123456789ab",
        expert.facts["origin"][:12],
    }


def test_whatever_descends_from_one_seed_can_be_averaged(grown: GrownForest) -> None:
    ledger = grown.driver.ledger
    assert grown.grown.baseline is not None
    seed = ledger.get(Ref("model", grown.grown.forest.foundation.seed))
    average = ledger.get(grown.averages["uniform"])
    check_compatible(ledger, [seed, *grown.experts, ledger.get(grown.grown.baseline), average])


def test_averages_are_weighted_by_the_prior_that_the_plan_says(grown: GrownForest) -> None:
    market, experts, driver = grown.text("market"), [expert.ref for expert in grown.experts], grown.driver
    forest = forest_ensemble(grown.prepared, grown.grown.forest)
    found = {}
    for prior in ("fitted", "ema"):
        merging = grown.prepared.plan.merging.model_copy(update={"average_prior": prior})
        prepared = replace(grown.prepared, plan=grown.prepared.plan.model_copy(update={"merging": merging}))
        score_models(prepared, dict.fromkeys(experts, "an expert"), [market], driver, ["development"])
        sample = stack_of(driver.ledger, experts, market, "development").take(0, merging.development_blocks)
        expected = posterior_weights(log_prior(prior, *sample, FULL).exp())
        average = driver.ledger.get(averaged_starts(prepared, forest, [market], driver)[0].model)
        found[prior] = [average.facts["weights"].get(expert.identity, 0.0) for expert in experts]
        assert found[prior] == expected
    assert found["fitted"] != found["ema"]
    assert MergingPlan().average_prior == "fitted"


class CountedReads(LocalFolder):
    """A folder that counts how often each blob is read."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.read_blobs: Counter[str] = Counter()

    def download(self, key: str, anew: bool = False) -> Path:
        self.read_blobs[key] += 1
        return super().download(key, anew)

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        assert not key.startswith("blobs/"), "read beside its mapped file"
        return super().read(key, start, size)


def drop_averages(grown: GrownForest, driver: Driver, plan: Plan) -> dict[Ref, bytes]:
    """Deletes the averages of an evaluation; their weights by name. Other tests have made others."""
    averages = [driver.ledger.get(ref) for ref in grown.averages.values()]
    weights = {one.ref: files_of(driver, one)["model.safetensors"].read_bytes() for one in averages}
    for one in averages:
        (Path(plan.store) / artifact_key(one.ref)).unlink()
    return weights


def test_an_evaluation_reads_each_expert_once_for_all_averages(grown: GrownForest, tmp_path: Path) -> None:
    """Every expert was read, and hashed, once for each text."""
    plan = copy_store(grown.prepared.plan, tmp_path / "store")
    before = drop_averages(grown, in_process(plan), plan)
    assert len(before) == len(grown.prepared.texts) + 1
    storage = CountedReads(plan.store)
    driver = Driver(Ledger(storage), InProcess(Ledger(storage), LocalControl(lambda _: None, Event())))
    evaluate(grown.prepared, grown.grown.forest, grown.grown.baseline, driver)
    assert driver.made == {"model": len(before)}
    for expert in grown.experts:
        assert storage.read_blobs[blob_key(expert.ref, expert.blob("model.safetensors").sha256)] == 1
    for ref, weights in before.items():
        assert files_of(driver, driver.ledger.get(ref))["model.safetensors"].read_bytes() == weights


def test_averages_that_do_not_fit_on_the_disk_together_are_made_in_several_passes(
    grown: GrownForest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = copy_store(grown.prepared.plan, tmp_path / "store")
    before = drop_averages(grown, in_process(plan), plan)
    monkeypatch.setattr(average, "SCRATCH_SHARE", 0.0)
    driver = in_process(plan)
    evaluate(grown.prepared, grown.grown.forest, grown.grown.baseline, driver)
    for ref, weights in before.items():
        assert files_of(driver, driver.ledger.get(ref))["model.safetensors"].read_bytes() == weights


def test_a_damaged_expert_fails_the_averages_that_it_has_weight_in_and_no_others(
    grown: GrownForest, store: Driver
) -> None:
    damaged, *others = grown.experts
    with (Path(store.ledger.storage.location) / f"blobs/{damaged.blob('model.safetensors').sha256}").open(
        "r+b"
    ) as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"not what was written")
    models = tuple(expert.ref for expert in grown.experts)
    shares = [(0.5, 0.25, 0.25), (0.0, 0.25, 0.75), (0.25, 0.75, 0.0), (0.0, 0.75, 0.25)]
    requests = [AverageRequest(f"average {number}", models, share) for number, share in enumerate(shares)]
    outcomes = run_all(store.workers, requests)
    for request, outcome in zip(requests, outcomes, strict=True):
        if request.weights[0]:
            assert isinstance(outcome, Failure)
            assert outcome.label == request.label
            assert f"model {damaged.identity[:12]}, file model.safetensors" in outcome.cause
            assert "is damaged" in outcome.cause
        else:
            assert isinstance(outcome, Artifact)
            assert outcome.facts["weights"] == dict(
                sorted(zip([expert.identity for expert in others], request.weights[1:], strict=True))
            )


def test_averages_of_a_batch_that_are_made_already_are_left_out(grown: GrownForest, store: Driver) -> None:
    """A process that was killed while it stored a batch is started again with all of it."""
    models = tuple(expert.ref for expert in grown.experts)
    made = [AverageRequest(f"average {n}", models, (0.5, n / 10, 0.5 - n / 10)) for n in range(1, 4)]
    first = run_all(store.workers, made[1:2])
    lose_weights(store, *grown.experts)
    assert list(average.average(made[1:2], store.ledger, LocalControl(lambda _: None, Event()))) == first


MEASURE = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from btm_cluster.language_model.averaging import average_models
from btm_cluster.language_model.stored_weights import TensorFiles, write_shards

TENSORS, ROWS = 64, 128  # of 512 kB each: a model of 32 MB
folder = Path(sys.argv[1])
files = [folder / f"{i}.safetensors" for i in range(3)]
for i, file in enumerate(files):
    save_file({f"t{j:02d}": torch.full((ROWS, 1024), float(i + j)) for j in range(TENSORS)}, file)

def held():  # what the process owns; pages of mapped files are the system's, to be dropped whenever it needs room
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

average = average_models([TensorFiles([file]) for file in files], [0.2, 0.3, 0.5])
write_shards(average, folder, 2**30)
before, peak = held(), 0

def watch(*_):
    global peak
    peak = max(peak, held())

sys.setprofile(watch)
write_shards(average, folder, 8 * 2**20)
sys.setprofile(None)
print((peak - before) // (ROWS * 1024 * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
def test_averaging_and_sharding_hold_a_few_tensors_at_a_time_and_never_a_model(tmp_path: Path) -> None:
    script = [sys.executable, "-c", MEASURE, str(tmp_path)]
    tensors_held = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert int(tensors_held) <= 8, "a model has 64 tensors, three have 192"
    found = TensorFiles(sorted(tmp_path.glob("model-*.safetensors"))).read("t05")
    assert found[0, 0] == pytest.approx(0.2 * 5 + 0.3 * 6 + 0.5 * 7)
