"""Training whose memory or disk runs out, or whose machine is about to go:
nothing is lost, and the end is clear."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btm_cluster.driver.port import Failure
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import score_request
from btm_cluster.equations.budget import trained_bytes
from btm_cluster.errors import ResourcesError, StoreError, TrainingError
from btm_cluster.ledger import Ledger
from btm_cluster.operations.plan import check_run, preview
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests.progress import Progress
from btm_cluster.session import driving, opened_view
from btm_cluster.workers import disk_and_memory
from tests.conftest import in_process, run_all
from tests.integration.conftest import PreparedStore, copy_store
from tests.integration.test_training import AT_EVERY_UPDATE, Undisturbed, last_saved, run, weights_of

UPDATES = 6


@pytest.fixture(scope="module")
def undisturbed(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The seed's weights when nothing happens."""
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("undisturbed") / "store")
    prepared_store = PreparedStore(driver := in_process(plan), prepare(plan, driver))
    return weights_of(run(prepared_store, prepared_store.seed))


# Memory


def _python() -> None:
    raise MemoryError


def _torch_on_a_cpu() -> None:
    torch.empty(10**15)  # a plain RuntimeError, which was once not known for what it is


def _torch_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


RUNS_OUT = [_python, _torch_on_a_cpu, _torch_on_a_gpu]


@dataclass
class Hungry(Undisturbed):
    """Finds no memory left before update `at`, so many times."""

    run_out: Callable[[], None]
    times: int
    at: int = 4
    asked: int = 0

    def stopping(self) -> bool:
        self.asked += 1
        if self.times and self.asked > self.at:
            self.times -= 1
            self.run_out()
        return False


@pytest.mark.parametrize("lacking", ["memory", "disk of the store", "disk on which seed is written"])
def test_a_run_that_memory_or_disk_cannot_hold_is_refused_before_a_text_is_read(
    lacking: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.model_validate(fields)
    needed = trained_bytes(preview(plan, Ledger.open(plan.store)).parameters)
    monkeypatch.setattr(disk_and_memory, "_memory", lambda: needed - (lacking == "memory"))
    free = {"disk of the store": (10, 10**9), "disk on which seed is written": (10**9, 10)}
    of_store, of_scratch = free.get(lacking, (10**9, 10**9))
    monkeypatch.setattr(
        disk_and_memory.shutil,
        "disk_usage",
        lambda folder: SimpleNamespace(free=of_scratch if Path(folder) == Path(gettempdir()) else of_store),
    )
    with (
        opened_view() as view,
        driving(view, plan, None, True) as driver,
        pytest.raises(ResourcesError, match=f"the {lacking}"),
    ):
        check_run(plan, driver)
    assert not list(driver.ledger.list_artifacts("source"))


def test_a_run_into_a_store_that_cannot_be_written_to_is_refused_before_a_text_is_read(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.model_validate(fields)
    # Tests may run as root, who may write everywhere.
    monkeypatch.setattr(disk_and_memory.os, "access", lambda *_: False)
    with (
        opened_view() as view,
        driving(view, plan, None, True) as driver,
        pytest.raises(ResourcesError, match="cannot be written to"),
    ):
        check_run(plan, driver)
    assert not list(driver.ledger.list_artifacts("source"))


@pytest.mark.parametrize("run_out", RUNS_OUT)
def test_memory_that_runs_out_once_costs_an_update_since_the_last_checkpoint(
    prepared_store: PreparedStore, undisturbed: dict[str, str], run_out: Callable[[], None]
) -> None:
    control = Hungry(run_out, times=1)
    made = run(prepared_store, replace(prepared_store.seed, checkpoint_seconds=AT_EVERY_UPDATE), control)
    assert weights_of(made) == undisturbed
    assert control.asked == UPDATES + 1


@pytest.mark.parametrize("run_out", RUNS_OUT)
def test_memory_that_runs_out_again_is_an_error_that_keeps_the_last_checkpoint(
    prepared_store: PreparedStore, undisturbed: dict[str, str], run_out: Callable[[], None]
) -> None:
    request = replace(prepared_store.seed, checkpoint_seconds=AT_EVERY_UPDATE)
    control = Hungry(run_out, times=2)
    with pytest.raises(TrainingError) as failed:
        run(prepared_store, request, control)
    assert "seed: out of memory" in failed.value.what
    assert "micro_batch_blocks" in failed.value.remedy
    assert (control.times, last_saved(prepared_store, request)) == (0, 4)
    assert weights_of(run(prepared_store, request)) == undisturbed


def test_an_error_that_is_no_want_of_memory_is_not_tried_again(prepared_store: PreparedStore) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    control = Hungry(fail, times=9)
    with pytest.raises(RuntimeError, match="a bug"):
        run(prepared_store, prepared_store.seed, control)
    assert control.times == 8


# Disk


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Nothing more fits while this lasts."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def test_a_disk_that_is_full_while_training_costs_its_checkpoints_and_then_is_named(
    prepared_store: PreparedStore,
    undisturbed: dict[str, str],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Once the first checkpoint ended the training, and scoring the process: safetensors has errors of its
    # own, and writing to a memory map on a full disk is SIGBUS.
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    ledger, request = (
        prepared_store.driver.ledger,
        replace(prepared_store.seed, checkpoint_seconds=AT_EVERY_UPDATE),
    )
    with filled(small_disk):
        with pytest.raises(StoreError) as failed:
            run(prepared_store, request)
        assert f"the disk below {small_disk} is full" in failed.value.what
        assert "No space left on device" in failed.value.found
        assert "TMPDIR" in failed.value.remedy
        assert caplog.text.count("a training checkpoint was not stored") == UPDATES
        (outcome,) = run_all(prepared_store.driver.workers, [request])
        assert isinstance(outcome, Failure)
        assert str(small_disk) in outcome.cause
    assert verify(ledger).problems == ()
    assert list(small_disk.iterdir()) == []
    made = run(prepared_store, request)
    assert weights_of(made) == undisturbed
    text = prepared_store.prepared.texts[0]
    score = score_request(prepared_store.prepared, made.ref, text, "test", "a model")
    with filled(small_disk):
        (outcome,) = run_all(prepared_store.driver.workers, [score])
        assert isinstance(outcome, Failure)
        assert str(small_disk) in outcome.cause
    (outcome,) = run_all(prepared_store.driver.workers, [score])
    assert not isinstance(outcome, Failure)


# A machine that will be taken away


@dataclass
class Noticed(Undisturbed):
    """Is told, from the first update on, that its machine will go."""

    heard: int = 0

    def saving(self) -> bool:
        self.heard += 1
        return True

    def report(self, progress: Progress) -> None:
        if progress.phase == "training":
            raise RuntimeError("gone")


def test_who_is_told_that_its_machine_will_go_saves_at_the_next_update_once_and_goes_on(
    prepared_store: PreparedStore, undisturbed: dict[str, str]
) -> None:
    request, control = replace(prepared_store.seed, checkpoint_seconds=1e9), Noticed()
    with pytest.raises(RuntimeError, match="gone"):
        run(prepared_store, request, control)
    assert (last_saved(prepared_store, request), control.heard) == (1, 1)
    assert weights_of(run(prepared_store, request)) == undisturbed


def test_a_run_on_gpus_without_the_memory_is_refused_before_a_text_is_read_with_what_fits(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.model_validate(fields | {"cluster": fields["cluster"] | {"seed_gpus": 1}})
    monkeypatch.setattr(disk_and_memory, "gpu_bytes", lambda: 10**6)
    with opened_view() as view, driving(view, plan, None, True) as driver:
        with pytest.raises(ResourcesError, match="seed does not fit the memory of its GPUs") as raised:
            check_run(plan, driver)
        assert not list(driver.ledger.list_artifacts("source"))
    assert "cluster.micro_batch_blocks" in str(raised.value.remedy)


@pytest.mark.parametrize(("seed_gpus", "gpus_per_expert"), [(4, 1), (1, 4), (0.5, 0)])
def test_gpus_that_no_machine_has_are_refused_before_a_text_is_read(
    seed_gpus: float, gpus_per_expert: float, fields: dict[str, Any]
) -> None:
    cluster = fields["cluster"] | {
        "seed_gpus": seed_gpus,
        "gpus_per_expert": gpus_per_expert,
        "compile": "off",
    }
    plan = Plan.model_validate(fields | {"cluster": cluster})
    with (
        opened_view() as view,
        driving(view, plan, None, True) as driver,
        pytest.raises(ResourcesError, match="can never hold"),
    ):
        check_run(plan, driver)
    assert not list(driver.ledger.list_artifacts("source"))
