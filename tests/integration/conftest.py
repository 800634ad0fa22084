"""Real two-layer models for unit tests: a prepared store that each test may copy,
and a grown forest that none changes."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from btm_cluster.algorithm import Grown, branch, found, grow
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import seed_request, transformer_lm_request
from btm_cluster.evaluation.evaluate import Evaluation, evaluate, forest_ensemble
from btm_cluster.evaluation.fitting import average_request
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from btm_cluster.steps.stored import documents_of, open_model, open_tokenizer
from tests.conftest import in_process, plan_fields


def train_seed(prepared: PreparedPlan, driver: Driver) -> Forest:
    """A forest of a seed alone, unless there is one already."""
    forest = driver.ledger.log.newest()
    return forest or found(prepared, driver.obtain([seed_request(prepared)])[0], driver)


@dataclass(frozen=True)
class PreparedStore:
    """A store of one's own with texts, tokenizer and token blocks, and nothing trained yet."""

    driver: Driver
    prepared: PreparedPlan

    @property
    def seed(self) -> TrainRequest:
        return seed_request(self.prepared)

    @property
    def transformer_lm(self) -> TrainRequest:
        return transformer_lm_request(self.prepared, self.seed.ref)

    def train_seed(self) -> Forest:
        return train_seed(self.prepared, self.driver)

    def branches(self) -> list[TrainRequest]:
        """The experts' requests, once the seed is trained."""
        return branch(self.prepared, self.train_seed(), self.driver)


@dataclass(frozen=True)
class GrownForest:
    """A forest with its baseline and evaluation, to be read only."""

    driver: Driver
    grown: Grown
    evaluation: Evaluation

    @property
    def prepared(self) -> PreparedPlan:
        return self.grown.prepared

    @property
    def experts(self) -> list[Artifact]:
        return [self.driver.ledger.get(Ref("model", expert.identity)) for expert in self.grown.forest.experts]

    @property
    def averages(self) -> dict[str, Ref]:
        """Those that the evaluation made."""
        forest, prior = (
            forest_ensemble(self.prepared, self.grown.forest),
            self.prepared.plan.merging.average_prior,
        )
        asked = {"uniform": ("uniform", None)} | {
            f"posterior for {t.name}": (prior, t) for t in self.prepared.texts
        }
        return {name: average_request(self.prepared, forest, *how).ref for name, how in asked.items()}

    def text(self, name: str) -> PreparedText:
        return next(text for text in self.prepared.texts if text.name == name)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As training on one CPU sets it, so that every sum in these tests has one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan_with_blocks(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of two-layer models whose store holds its texts as blocks."""
    fields = plan_fields(texts, tmp_path_factory.mktemp("prepared") / "store")
    fields["model"] = {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2}}
    fields["baselines"] = ["transformer-lm"]
    fields["cluster"]["micro_batch_blocks"] = 4  # several for an update
    plan = Plan.model_validate(fields)
    prepare(plan, in_process(plan))
    return plan


@pytest.fixture(scope="session")
def founded_plan(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of two domains whose forest is grown and evaluated: what expansions start from. To be copied."""
    fields = plan_fields(texts, tmp_path_factory.mktemp("founded") / "store")
    fields["training"] |= {"updates": 24, "seed_share": 0.25, "learning_rate": 1e-2}  # until experts differ
    plan = Plan.model_validate(fields | {"domains": fields["domains"][:2], "baselines": ["transformer-lm"]})
    run_plan(plan, in_process(plan))
    return plan


def copy_store(plan: Plan, folder: Path) -> Plan:
    """The same plan on a copy of its store."""
    shutil.copytree(plan.store, folder)
    return plan.model_copy(update={"store": str(folder)})


@pytest.fixture
def prepared_store(plan_with_blocks: Plan, tmp_path: Path) -> PreparedStore:
    """A prepared store of the test's own."""
    plan = copy_store(plan_with_blocks, tmp_path / "prepared-store")
    driver = in_process(plan)
    return PreparedStore(driver, prepare(plan, driver))


@pytest.fixture(scope="session")
def grown(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> GrownForest:
    """A forest of two-layer experts, trained until they differ, with its scores and averages."""
    longer = {"updates": 24, "seed_share": 0.25, "learning_rate": 1e-2}
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("grown") / "store")
    cluster = plan.cluster.model_copy(update={"micro_batch_blocks": 16})
    plan = plan.model_copy(update={"training": plan.training.model_copy(update=longer), "cluster": cluster})
    driver = in_process(plan)
    result = grow(plan, driver)
    return GrownForest(driver, result, evaluate(result.prepared, result.forest, result.baseline, driver))


class WrittenForest:
    """A forest whose experts differ, with its plan in a file. Tests may add fits and scores to it, no version."""

    def __init__(self, plan: Plan, folder: Path, driver: Driver, grown: Grown) -> None:
        self.plan, self.driver, self.grown = plan, driver, grown
        self.plan_path = folder / "plan.yaml"
        self.ledger = driver.ledger
        self.tokenizer = open_tokenizer(driver.ledger, grown.prepared.tokenizer)

    def models(self) -> list[Any]:
        found = [self.ledger.get(Ref("model", expert.identity)) for expert in self.grown.forest.experts]
        return [open_model(self.ledger, model) for model in found]

    def test_documents(self, name: str) -> list[str]:
        text = next(text for text in self.grown.prepared.texts if text.name == name)
        return list(documents_of(self.ledger, text.identity, "test"))

    def written_out(self, ids: list[int]) -> tuple[list[list[float]], list[float]]:
        """log p_j of each token by expert, and log p under the paper's posterior,
        block by block: read without any of our code."""
        logp = [_read_alone(model, ids, self.tokenizer.first_token) for model in self.models()]
        mixed = []
        for t in range(len(ids)):
            first = t - t % BLOCK  # the posterior begins anew with every block
            joint = [math.exp(sum(one[first:t])) for one in logp]
            mixed.append(
                math.log(sum(w * math.exp(one[t]) for w, one in zip(joint, logp, strict=True)) / sum(joint))
            )
        return logp, mixed


BLOCK = 32
"""Tokens, as the tiny plan has it."""


def _read_alone(model: Any, ids: list[int], first_token: int) -> list[float]:
    logp: list[float] = []
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        with torch.no_grad():
            said = torch.log_softmax(model(torch.tensor([[first_token, *block[:-1]]])).logits[0].double(), -1)
        logp += [float(said[t, token]) for t, token in enumerate(block)]
    return logp


@pytest.fixture(scope="session")
def forest(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> WrittenForest:
    """A forest to use: to score with, to write with, to open."""
    folder = tmp_path_factory.mktemp("written")
    fields = plan_fields(texts, folder / "store")
    fields["training"] |= {"updates": 24, "seed_share": 0.25, "learning_rate": 1e-2}
    plan = Plan.model_validate(fields)
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    driver = in_process(plan)
    return WrittenForest(plan, folder, driver, grow(plan, driver))
