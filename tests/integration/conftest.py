"""Real two-layer models for unit tests: a prepared store that each test may copy,
and a grown forest that none changes."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from btm_cluster.algorithm import Grown, branch, grow, train_seed
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.prepared_plan import PreparedPlan, PreparedText
from btm_cluster.driver.recipes import seed_request, transformer_lm_request
from btm_cluster.evaluation.evaluate import Evaluation, evaluate
from btm_cluster.forest import Forest
from btm_cluster.ledger import Artifact, Ref
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.requests import TrainRequest
from tests.conftest import in_process, plan_fields


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
