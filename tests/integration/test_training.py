"""Training of real two-layer models: killed and resumed, cut in two,
accumulated, diverging, and against a plain loop."""

import gzip
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from btm_cluster import curve
from btm_cluster.curve import CURVE_FILE
from btm_cluster.driver.driver import resumed
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request, score_request
from btm_cluster.errors import Stopped, StoreError, TrainingError
from btm_cluster.language_model import training
from btm_cluster.language_model.loss import NextTokenLoss, read_after
from btm_cluster.language_model.model import build_model
from btm_cluster.language_model.optimizer import build_optimizer
from btm_cluster.language_model.tensor_files import OPTIMIZER_FILE, WEIGHTS
from btm_cluster.language_model.training_state import (
    TrainingState,
    write_state,
)
from btm_cluster.ledger import Artifact, Ledger, artifact_key
from btm_cluster.ledger.curves import read_curve, read_rise
from btm_cluster.ledger.lineage import reached
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests import AverageRequest, Start, TraceOf, TrainRequest
from btm_cluster.requests.progress import Progress
from btm_cluster.steps.checkpoints import load_stored
from btm_cluster.steps.stored import open_blocks
from btm_cluster.steps.train import train
from btm_cluster.steps.training_run import run_training
from btm_cluster.storage.scratch import is_in_scratch
from tests.conftest import in_process, run_all
from tests.integration.conftest import PreparedStore, copy_store
from tests.made import origin

AT_EVERY_UPDATE = 1e-9
"""A time between two training checkpoints that is always over."""


class Undisturbed:
    """Lets training run."""

    def report(self, progress: Progress) -> None:
        pass

    def stopping(self) -> bool:
        return False

    def saving(self) -> bool:
        return False


class MachineDied(Exception):
    """Stands for anything that ends a process without asking."""


@dataclass
class Interrupting(Undisturbed):
    """After `updates` more updates, stops (or dies)."""

    updates: int
    dies: bool = False

    def stopping(self) -> bool:
        self.updates -= 1
        if self.updates < 0 and self.dies:
            raise MachineDied
        return self.updates < 0


def weights_of(model: Artifact) -> dict[str, str]:
    """Hashes of the files in which bit-identical trainings are bit-identical."""
    files = (WEIGHTS, OPTIMIZER_FILE, CURVE_FILE)
    return {blob.name: blob.sha256 for blob in model.blobs if blob.name in files}


def run(prepared_store: PreparedStore, request: TrainRequest, control: Undisturbed | None = None) -> Artifact:
    """Trains as the driver asks for it: with the resources of the first start."""
    ledger = prepared_store.driver.ledger
    return train(resumed(request, ledger), ledger, control or Undisturbed())


def last_saved(prepared_store: PreparedStore, request: TrainRequest) -> int | None:
    saved = prepared_store.driver.ledger.latest_training(request.ref.identity)
    return None if saved is None else saved.recipe["update"]


def average_of(prepared_store: PreparedStore, models: list[Artifact]) -> Start:
    """A start from the uniform average of models, as a later branch has it."""
    weights = (1 / len(models),) * len(models)
    request = AverageRequest("start", tuple(model.ref for model in models), weights)
    (average,) = run_all(prepared_store.driver.workers, [request])
    assert isinstance(average, Artifact)
    return Start(average.ref, keep_optimizer=False)


def branched_from_average(prepared_store: PreparedStore) -> TrainRequest:
    first, second, third = prepared_store.branches()
    return replace(
        third, start=average_of(prepared_store, [run(prepared_store, first), run(prepared_store, second)])
    )


REQUESTS: dict[str, Callable[[PreparedStore], TrainRequest]] = {
    "seed": lambda prepared_store: prepared_store.seed,
    "expert": lambda prepared_store: prepared_store.branches()[0],
    "expert from an average": branched_from_average,
    "transformer-lm": lambda prepared_store: (prepared_store.train_seed(), prepared_store.transformer_lm)[1],
}


@pytest.fixture(scope="module")
def undisturbed(
    plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[str, str]]:
    """Weights of every kind of training when nothing happens to it."""
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("undisturbed") / "store")
    driver = in_process(plan)
    prepared_store = PreparedStore(driver, prepare(plan, driver))
    return {
        kind: weights_of(run(prepared_store, request(prepared_store))) for kind, request in REQUESTS.items()
    }


# Killed and resumed


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("kind", ["seed", "expert"])
def test_training_stopped_before_any_update_and_resumed_ends_in_the_same_weights(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]], kind: str, after: int
) -> None:
    request = REQUESTS[kind](prepared_store)
    with pytest.raises(Stopped):
        run(prepared_store, request, Interrupting(after))
    assert last_saved(prepared_store, request) == request.first_update + after
    assert prepared_store.driver.ledger.find(request.ref) is None
    assert weights_of(run(prepared_store, request)) == undisturbed[kind]
    assert last_saved(prepared_store, request) is None


@pytest.mark.parametrize("kind", list(REQUESTS))
def test_training_that_dies_at_every_update_ends_in_the_same_weights(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]], kind: str
) -> None:
    request = replace(REQUESTS[kind](prepared_store), checkpoint_seconds=AT_EVERY_UPDATE)
    for update in range(max([request.first_update, *request.milestones]) + 1, request.last_update):
        with pytest.raises(MachineDied):
            run(prepared_store, request, Interrupting(1, dies=True))
        assert last_saved(prepared_store, request) == update
    assert weights_of(run(prepared_store, request)) == undisturbed[kind]


def test_training_whose_last_report_fails_loses_one_update_and_ends_in_the_same_weights(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a slow machine an earlier report was due, and failed.
    monkeypatch.setattr(training, "REPORT_SECONDS", math.inf)

    class Unreachable(Undisturbed):
        def report(self, progress: Progress) -> None:
            raise MachineDied(progress.label)

    request = replace(prepared_store.seed, checkpoint_seconds=AT_EVERY_UPDATE)
    with pytest.raises(MachineDied):
        run(prepared_store, request, Unreachable())
    assert last_saved(prepared_store, request) == 5
    assert weights_of(run(prepared_store, request)) == undisturbed["seed"]


def test_training_killed_between_its_last_checkpoint_and_its_commit_has_nothing_left_to_do(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    ledger, request = (
        prepared_store.driver.ledger,
        replace(prepared_store.seed, checkpoint_seconds=AT_EVERY_UPDATE),
    )
    texts = [open_blocks(ledger, text) for text in request.texts]
    run_training(request, ledger, Undisturbed(), texts, end_of_text(prepared_store), lambda *_: None)
    assert last_saved(prepared_store, request) == request.last_update
    assert weights_of(run(prepared_store, request, Interrupting(0, dies=True))) == undisturbed["seed"]


KILLED = """
import os, sys
from dataclasses import replace
from btm_cluster.driver.preparation import prepare
from btm_cluster.plan import Plan
from btm_cluster.driver.recipes import seed_request
from btm_cluster.steps.stored import open_blocks
from btm_cluster.steps.train import train
from tests.conftest import in_process

class Killed:
    left = 4
    def report(self, progress): pass
    def saving(self): return False
    def stopping(self):
        self.left -= 1
        if self.left < 0:
            os._exit(137)  # nothing is flushed, no checkpoint under way is waited for
        return False

plan = Plan.model_validate_json(sys.stdin.read())
driver = in_process(plan)
train(replace(seed_request(prepare(plan, driver)), checkpoint_seconds=1e-9), driver.ledger, Killed())
"""


def test_a_process_killed_in_the_middle_leaves_a_store_from_which_training_ends_in_the_same_weights(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=prepared_store.prepared.plan.model_dump_json(exclude_defaults=True),
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert killed.returncode == 137, killed.stderr
    assert last_saved(prepared_store, prepared_store.seed) in (3, 4), "a save waits for the one before"
    assert weights_of(run(prepared_store, prepared_store.seed)) == undisturbed["seed"]


def test_experts_stopped_before_their_first_update_harm_neither_the_seed_nor_each_other(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    # Their training checkpoints hold the seed's own weights. Checkpoints once shared the store's blobs with
    # it, and the first expert to finish deleted, with its checkpoint, the seed and its siblings' checkpoints.
    branches = prepared_store.branches()
    for request in branches:
        with pytest.raises(Stopped):
            run(prepared_store, request, Interrupting(0))
    experts = [run(prepared_store, request) for request in branches]
    assert weights_of(experts[0]) == undisturbed["expert"]
    seed = prepared_store.driver.ledger.get(prepared_store.seed.ref)
    for blob in seed.blobs:
        prepared_store.driver.ledger.open_file(seed, blob.name)


def test_a_retry_keeps_the_resources_of_the_first_start_since_results_depend_on_them(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    with pytest.raises(Stopped):
        run(prepared_store, prepared_store.seed, Interrupting(3))
    finished = run(
        prepared_store,
        replace(prepared_store.seed, how=replace(prepared_store.seed.how, micro_batch_blocks=5)),
    )
    assert finished.facts["profile"]["micro_batch_blocks"] == prepared_store.seed.how.micro_batch_blocks == 4
    assert weights_of(finished) == undisturbed["seed"]


def test_a_finished_training_is_not_run_again(prepared_store: PreparedStore) -> None:
    first = run(prepared_store, prepared_store.seed)
    assert run(prepared_store, prepared_store.seed, Interrupting(0, dies=True)) == first


# The Transformer-LM


def test_the_transformer_lms_first_half_is_the_seed_run_bit_for_bit(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    in_one_go = run(prepared_store, replace(prepared_store.transformer_lm, milestones=()))
    assert weights_of(in_one_go) == undisturbed["transformer-lm"]


def test_a_transformer_lm_that_is_trained_first_leaves_the_seeds_on_its_way(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    request = replace(prepared_store.transformer_lm, milestones=(3, 6), checkpoint_seconds=AT_EVERY_UPDATE)
    with pytest.raises(MachineDied):
        run(prepared_store, request, Interrupting(8, dies=True))
    found = {
        update: prepared_store.driver.ledger.find(request.until(update).ref) for update in request.milestones
    }
    assert weights_of(found[6]) == undisturbed["seed"]
    assert [found[update].facts["tokens"] for update in (3, 6)] == [3 * 3 * 4 * 32, 6 * 3 * 4 * 32]
    prepared_store.driver.ledger.clear_training(
        request.ref.identity
    )  # then the latest seed is what is left to go on from
    finished = run(prepared_store, request)
    assert weights_of(finished) == undisturbed["transformer-lm"]
    assert {found[update].facts["origin"] for update in request.milestones} == {finished.facts["origin"]}


def test_a_transformer_lm_leaves_the_weights_of_its_milestones_on_its_way(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]]
) -> None:
    prepared_store.train_seed()
    request, ledger = prepared_store.transformer_lm, prepared_store.driver.ledger
    assert (request.first_update, request.milestones, request.snapshots, request.last_update) == (
        0,
        (6,),
        (8, 10),
        12,
    )
    finished = run(prepared_store, request)
    assert weights_of(finished) == undisturbed["transformer-lm"]
    # The seed's seconds count: the GPU-seconds of a training in several legs are those of all of them.
    measured = finished.note["seconds"] * finished.note["tokens_per_second"]
    assert measured == pytest.approx(finished.facts["tokens"], rel=0.1)
    for snapshot in request.at_snapshots:
        stored = ledger.get(snapshot.ref)
        ends_there = run(prepared_store, request.until(snapshot.last_update))
        assert stored.blob("model.safetensors") == ends_there.blob("model.safetensors")
        assert stored.identity != ends_there.identity, "an expert that branches there needs the optimiser"
        assert (stored.has("optimizer.safetensors"), ends_there.has("optimizer.safetensors")) == (False, True)
        assert stored.facts["role"] == "transformer-lm"
        assert stored.facts["origin"] == finished.facts["origin"]
        assert stored.facts["tokens"] == snapshot.last_update * 3 * 4 * 32


def test_what_a_training_writes_is_linked_into_a_folder_on_the_same_disk(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of 7 billion parameters has checkpoints of 91 GB, for which a disk may have no space twice."""
    storage = prepared_store.driver.ledger.storage
    if Path(storage.location).stat().st_dev != Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("temporary files are on another disk than the store")

    def copy(file: Path, place: Path) -> None:
        assert not is_in_scratch(file), f"{file} is copied"
        place.write_bytes(file.read_bytes())  # the tokenizer's, which is stored already

    monkeypatch.setattr(shutil, "copyfile", copy)
    request = prepared_store.transformer_lm
    with pytest.raises(Stopped):
        run(prepared_store, request, Interrupting(7))
    assert last_saved(prepared_store, request) == 7
    run(prepared_store, request)
    run(prepared_store, demix_request(prepared_store.prepared))
    assert not verify(prepared_store.driver.ledger).problems


def test_a_milestone_at_the_update_of_a_seed_is_kept_beside_it(prepared_store: PreparedStore) -> None:
    request = replace(prepared_store.transformer_lm, milestones=(6, 8))
    run(prepared_store, request)
    found = [prepared_store.driver.ledger.get(one.ref) for one in request.passing(8)]
    assert [(one.facts["role"], one.has("optimizer.safetensors")) for one in found] == [
        ("seed", True),
        ("transformer-lm", False),
    ]


def test_milestones_that_an_earlier_transformer_lm_did_not_leave_are_trained_once_more(
    prepared_store: PreparedStore,
) -> None:
    driver = prepared_store.driver
    prepared_store.train_seed()
    finished = run(prepared_store, replace(prepared_store.transformer_lm, snapshots=(9,)))
    request = prepared_store.transformer_lm
    assert driver.require([request]) == [finished]
    made = [driver.ledger.get(one.ref) for one in request.at_snapshots]
    assert [one.recipe["last_update"] for one in made] == [8, 10]
    assert made[0].note["tokens_per_second"] > 0
    count = driver.made["model"]
    assert driver.require([request]) == [finished]
    assert driver.made["model"] == count


def test_seed_and_experts_together_see_as_many_tokens_as_the_transformer_lm(
    prepared_store: PreparedStore,
) -> None:
    seed = run(prepared_store, prepared_store.seed).facts["tokens"]
    experts = [request.tokens for request in prepared_store.branches()]
    baseline = run(prepared_store, prepared_store.transformer_lm).facts["tokens"]
    assert seed == 6 * 3 * 4 * 32
    assert baseline == sum(experts) + seed
    assert sum(experts) == seed


# Against a plain loop


def end_of_text(prepared_store: PreparedStore) -> int:
    """The token's number, from the tokenizer's file."""
    ledger = prepared_store.driver.ledger
    file = ledger.open_file(ledger.get(prepared_store.prepared.tokenizer), "tokenizer.json")
    added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
    return next(int(token["id"]) for token in added if token["content"] == "<|endoftext|>")


def training_blocks(ledger: Ledger, request: TrainRequest) -> list[np.ndarray]:
    """All training blocks of each text."""
    return [
        np.concatenate([np.load(ledger.open_file(ledger.get(ref), "tokens.npy")) for ref in text.tokens])
        for text in request.texts
    ]


def shuffled(random_seed: int, text: str, blocks: int, positions: range) -> list[int]:
    """The block at each position of an endless pass over a text, every epoch in an order of its own."""
    indices = []
    for position in positions:
        digest = hashlib.sha256(f"{random_seed}/{text}/{position // blocks}".encode()).digest()
        order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).permutation(blocks)
        indices.append(int(order[position % blocks]))
    return indices


@dataclass
class PlainAdam:
    """AdamW and gradient clipping from their formulas (Loshchilov and Hutter, 2019), on float32 tensors."""

    parameters: dict[str, torch.Tensor]
    steps: int = 0

    def __post_init__(self) -> None:
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step(self, learning_rate: float, request: TrainRequest) -> float:
        """Changes the parameters; returns the norm of the gradient."""
        plan, (b1, b2) = request.training, request.training.betas
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.parameters.values()))
        scale = min(1.0, plan.gradient_clip / (norm + 1e-6))
        self.steps += 1
        for name, p in self.parameters.items():
            gradient = p.grad * scale
            self.m[name] = b1 * self.m[name] + (1 - b1) * gradient
            self.v[name] = b2 * self.v[name] + (1 - b2) * gradient * gradient
            m, v = self.m[name] / (1 - b1**self.steps), self.v[name] / (1 - b2**self.steps)
            decay = plan.weight_decay if p.dim() >= 2 else 0.0
            with torch.no_grad():
                p -= learning_rate * (decay * p + m / (v.sqrt() + plan.epsilon))
            p.grad = None
        return norm


def plain_loss(model: PreTrainedModel, rows: np.ndarray, end: int) -> torch.Tensor:
    """Mean negative log-likelihood per token of blocks that are read after an end-of-text token."""
    blocks = torch.from_numpy(rows.astype(np.int64))
    read = torch.cat([torch.full((len(blocks), 1), end), blocks], dim=1)[:, :-1]
    log_p = torch.log_softmax(model(input_ids=read).logits, dim=-1)
    return -log_p.gather(-1, blocks[..., None]).mean()


@dataclass
class PlainTraining:
    """A whole training as one would write it in an afternoon."""

    prepared_store: PreparedStore
    request: TrainRequest

    def __post_init__(self) -> None:
        torch.manual_seed(self.request.training.random_seed)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**dict(self.request.model)))
        self.adam = PlainAdam(dict(self.model.named_parameters()))
        self.losses: list[float] = []
        self.norms: list[float] = []

    def run(
        self, request: TrainRequest, learning_rates: Mapping[int, float], first_position: int, order_seed: int
    ) -> None:
        count = request.training.blocks_per_domain_update
        texts = training_blocks(self.prepared_store.driver.ledger, request)
        end = end_of_text(self.prepared_store)
        for i, update in enumerate(range(request.first_update, request.last_update)):
            positions = range(first_position + i * count, first_position + (i + 1) * count)
            rows = [
                blocks[shuffled(order_seed, text.name, len(blocks), positions)]
                for text, blocks in zip(request.texts, texts, strict=True)
            ]
            loss = plain_loss(self.model, np.concatenate(rows), end)
            loss.backward()
            self.losses.append(float(loss.detach()))
            self.norms.append(self.adam.step(learning_rates[update], request))


class Listening(Undisturbed):
    """Keeps the losses that training reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def report(self, progress: Progress) -> None:
        if progress.phase == "training":
            assert progress.loss is not None
            self.losses.append(progress.loss)


# Peak 3e-3 of 12 updates, one of them warm-up: from 1 the line falls to 0 at 12.
LINE = {0: 3e-3} | {update: 3e-3 * (12 - update) / 11 for update in range(1, 12)}


def check_weights(prepared_store: PreparedStore, found: Artifact, plain: PlainTraining) -> None:
    stored = load_file(prepared_store.driver.ledger.open_file(found, "model.safetensors"))
    expected = dict(plain.model.named_parameters())
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(
            tensor, expected[name].detach(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_seed_and_expert_are_those_of_a_plain_training_loop(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    heard = Listening()
    seed = run(prepared_store, prepared_store.seed, heard)
    plain = PlainTraining(prepared_store, prepared_store.seed)
    plain.run(prepared_store.seed, LINE, first_position=0, order_seed=0)
    check_weights(prepared_store, seed, plain)
    request = prepared_store.branches()[1]
    expert = run(prepared_store, request, heard)
    # Adam goes on; the data start anew, in another order.
    plain.run(request, LINE, first_position=0, order_seed=1)
    check_weights(prepared_store, expert, plain)
    assert heard.losses == pytest.approx(plain.losses, rel=1e-5)
    curves = [read_curve(prepared_store.driver.ledger, model) for model in (seed, expert)]
    assert [curve.updates for curve in curves] == [list(range(1, 7)), list(range(7, 13))]
    assert [*curves[0].loss, *curves[1].loss] == pytest.approx(plain.losses, rel=1e-5)
    assert [*curves[0].gradient_norm, *curves[1].gradient_norm] == pytest.approx(plain.norms, rel=1e-4)
    assert [*curves[0].learning_rate, *curves[1].learning_rate] == pytest.approx(
        list(LINE.values()), rel=1e-5
    )
    tokens = [[update * texts * 4 * 32 for update in range(1, 7)] for texts in (3, 1)]
    assert [curve.tokens for curve in curves] == tokens
    assert plain.losses[-1] < plain.losses[0] - 0.3


@pytest.mark.parametrize("kind", ["seed", "expert", "demix"])
def test_development_loss_is_that_of_scores_of_the_same_blocks(
    prepared_store: PreparedStore, kind: str
) -> None:
    prepared, ledger = prepared_store.prepared, prepared_store.driver.ledger
    request = demix_request(prepared) if kind == "demix" else REQUESTS[kind](prepared_store)
    curve = read_curve(ledger, run(prepared_store, request))
    assert curve.development.updates == {"seed": [6], "expert": [6, 12], "demix": [12]}[kind]
    models = {part.text: part.ref for part in request.parts} or {
        text.text: request.ref for text in request.texts
    }
    asked = [
        score_request(prepared, models[text.identity], text, "development", text.name)
        for text in prepared.domains
        if text.identity in models
    ]
    losses = [-np.load(ledger.open_file(one, "logp.npy"))[0] for one in prepared_store.driver.require(asked)]
    assert curve.development.loss[-1] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_training_whose_development_blocks_are_lost_goes_on_without_their_loss(
    prepared_store: PreparedStore, undisturbed: Mapping[str, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    ledger, request = prepared_store.driver.ledger, prepared_store.seed
    ledger.storage.delete(artifact_key(request.texts[0].development[0]))
    model = run(prepared_store, request)
    assert weights_of(model)[WEIGHTS] == undisturbed["seed"][WEIGHTS]
    curve = read_curve(ledger, model)
    assert (len(curve.updates), curve.development.updates) == (6, [])
    assert "seed: trains without development loss: the store has no tokens" in caplog.text


def test_the_transformer_lm_is_a_plain_training_loop_that_goes_on_with_the_mix(
    prepared_store: PreparedStore,
) -> None:
    run(prepared_store, prepared_store.seed)
    found = run(prepared_store, prepared_store.transformer_lm)
    plain = PlainTraining(prepared_store, prepared_store.seed)
    plain.run(replace(prepared_store.seed, last_update=12), LINE, first_position=0, order_seed=0)
    check_weights(prepared_store, found, plain)


def test_a_branch_from_an_average_starts_a_plain_training_loop_anew(prepared_store: PreparedStore) -> None:
    request = branched_from_average(prepared_store)
    found = run(prepared_store, request)
    plain = PlainTraining(prepared_store, request)
    assert request.start is not None
    ledger = prepared_store.driver.ledger
    start = load_file(ledger.open_file(ledger.get(request.start.model), "model.safetensors"))
    plain.model.load_state_dict(start, strict=False)
    # With 6 updates, 1 % of them is a rise of one update.
    plain.run(request, LINE, first_position=0, order_seed=1)
    check_weights(prepared_store, found, plain)


@pytest.mark.parametrize("at_once", [1, 5, 12, 100])
def test_gradient_accumulation_is_one_large_batch(prepared_store: PreparedStore, at_once: int) -> None:
    found = run(
        prepared_store,
        replace(prepared_store.seed, how=replace(prepared_store.seed.how, micro_batch_blocks=at_once)),
    )
    plain = PlainTraining(prepared_store, prepared_store.seed)
    plain.run(prepared_store.seed, LINE, first_position=0, order_seed=0)
    check_weights(prepared_store, found, plain)


def test_initial_weights_and_block_order_follow_the_random_seed(prepared_store: PreparedStore) -> None:
    untrained = replace(prepared_store.seed, last_update=0)
    reseeded = replace(untrained, training=untrained.training.model_copy(update={"random_seed": 5}))
    torch.manual_seed(99)  # whatever the process has drawn before
    first = weights_of(run(prepared_store, untrained))
    assert weights_of(run(prepared_store, reseeded)) != first
    plain = PlainTraining(prepared_store, reseeded)
    found = prepared_store.driver.ledger.get(reseeded.ref)
    check_weights(prepared_store, found, plain)


# What goes wrong


def diverging(prepared_store: PreparedStore) -> TrainRequest:
    """A learning rate that throws the weights out of range in the first update."""
    settings = prepared_store.seed.training.model_copy(update={"learning_rate": 1e30})
    return replace(prepared_store.seed, training=settings, checkpoint_seconds=AT_EVERY_UPDATE)


def test_a_loss_that_is_not_finite_is_an_error_that_keeps_the_last_good_checkpoint(
    prepared_store: PreparedStore,
) -> None:
    request, ledger = diverging(prepared_store), prepared_store.driver.ledger
    for _ in range(2):
        with pytest.raises(TrainingError) as failed:
            run(prepared_store, request)
        assert "not finite" in failed.value.what
        assert failed.value.remedy
        assert last_saved(prepared_store, request) == 1
        assert ledger.find(request.ref) is None
    saved = ledger.latest_training(request.ref.identity)
    assert saved is not None
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(ledger.open_file(saved, name)).values())


@pytest.mark.parametrize("counts_as_rise", [False, True])
def test_a_training_whose_loss_rose_is_stored_and_warned_of(
    prepared_store: PreparedStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    counts_as_rise: bool,
) -> None:
    if counts_as_rise:  # none at all; `tests/unit/test_curves.py` has what is one
        monkeypatch.setattr(curve, "LEAST_RISE", 0)
        monkeypatch.setattr(curve, "RISE_ERRORS", 0)
    settings = prepared_store.seed.training.model_copy(update={"updates": 20})
    request = replace(prepared_store.seed, training=settings, last_update=20, milestones=())
    model = run(prepared_store, request)
    warning = r"seed: its training loss rose from .* a calmer recipe: lower `training.learning_rate`"
    assert bool(re.search(warning, caplog.text)) == counts_as_rise
    assert (read_rise(prepared_store.driver.ledger, model.ref) is not None) == counts_as_rise


def test_a_diverged_training_fails_alone(prepared_store: PreparedStore) -> None:
    failed, made = run_all(prepared_store.driver.workers, [diverging(prepared_store), prepared_store.seed])
    assert not isinstance(failed, Artifact)
    assert isinstance(made, Artifact)


@pytest.mark.parametrize("damaged", ["blobs", "manifest"])
def test_a_damaged_training_checkpoint_is_passed_over_and_training_starts_again(
    prepared_store: PreparedStore,
    undisturbed: Mapping[str, dict[str, str]],
    caplog: pytest.LogCaptureFixture,
    damaged: str,
) -> None:
    request = prepared_store.seed
    with pytest.raises(Stopped):
        run(prepared_store, request, Interrupting(3))
    saved = prepared_store.driver.ledger.latest_training(request.ref.identity)
    assert saved is not None
    folder = Path(prepared_store.driver.ledger.storage.location, "training", request.ref.identity)
    for file in (folder / "blobs").iterdir() if damaged == "blobs" else folder.glob("*.json"):
        file.write_bytes(b"?" + file.read_bytes()[1:])
    with pytest.raises(Stopped):  # what it saves there takes the damaged one's place
        run(prepared_store, request, Interrupting(3))
    assert ("its training checkpoint is damaged" if damaged == "blobs" else "passed over") in caplog.text
    again = prepared_store.driver.ledger.latest_training(request.ref.identity)
    assert again is not None
    assert again.recipe["update"] == saved.recipe["update"]
    assert weights_of(run(prepared_store, request)) == undisturbed["seed"]


def test_a_trace_of_the_updates_is_kept_as_long_as_the_model_is(prepared_store: PreparedStore) -> None:
    request = replace(prepared_store.seed, last_update=2, profile=True)
    model = run(prepared_store, request)
    assert isinstance(model, Artifact)
    ledger = prepared_store.driver.ledger
    trace = ledger.get(TraceOf(model.ref).ref)
    with gzip.open(ledger.open_file(trace, "trace.json.gz")) as file:
        assert json.load(file)["traceEvents"]
    artifacts = {artifact.ref: artifact for artifact in ledger.read_manifests().values()}
    assert trace.ref in reached({model.ref}, artifacts)
    assert trace.ref not in reached({*model.needs}, artifacts)
    assert replace(request, profile=False).ref == request.ref


def test_a_model_is_made_whose_trace_cannot_be_stored(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = prepared_store.seed.training.model_copy(update={"random_seed": 77})
    request = replace(prepared_store.seed, training=training, last_update=1, profile=True)
    commits = Ledger.commit

    def commit(ledger: Ledger, request: Any, *rest: Any) -> Artifact:
        if isinstance(request, TraceOf):
            raise StoreError("the store is full")
        return commits(ledger, request, *rest)

    monkeypatch.setattr(Ledger, "commit", commit)
    assert isinstance(run(prepared_store, request), Artifact)
    assert "could not be stored: the store is full" in caplog.text
    assert prepared_store.driver.ledger.latest_training(request.ref.identity) is None


def test_weights_that_the_very_last_update_spoiled_are_not_committed(prepared_store: PreparedStore) -> None:
    request = replace(prepared_store.seed, last_update=1)
    assert isinstance(run(prepared_store, request), Artifact)
    endless = replace(request, training=request.training.model_copy(update={"learning_rate": 1e300}))
    with pytest.raises(TrainingError, match="not finite"):
        run(prepared_store, endless)
    assert prepared_store.driver.ledger.find(endless.ref) is None


def test_a_parameter_that_never_had_a_gradient_has_no_moments_and_is_no_trouble(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    ledger = prepared_store.driver.ledger

    def fresh(random_seed: int) -> TrainingState:
        model = build_model(prepared_store.seed.model, random_seed)
        return TrainingState(model, build_optimizer(model, prepared_store.seed.training), update=0)

    trained, again = fresh(0), fresh(1)
    unused = trained.model.get_parameter("transformer.wpe.weight").requires_grad_(False)
    NextTokenLoss(trained.model)(read_after(tokens := torch.arange(32)[None], 0), tokens).backward()
    trained.optimizer.step(learning_rate=0.0)
    stored = ledger.commit(origin("model", {}), write_state(trained, tmp_path, with_optimizer=True), {})
    load_stored(again, 1, ledger, stored, keep_optimizer=True)
    parameters = again.model.named_parameters()
    without = {name for name, parameter in parameters if not again.optimizer.state_of(parameter)}
    assert without == {"transformer.wpe.weight"}
    assert torch.equal(again.model.get_parameter("transformer.wpe.weight"), unused)
    assert again.update == 1
