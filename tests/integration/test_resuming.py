"""Going on from training checkpoints: those that are lost, damaged, another's or
dropped meanwhile, and with other resources."""

import dataclasses
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from btm_cluster.driver.capacity import demand_of, fits, no_capacity
from btm_cluster.driver.driver import Driver, resumed
from btm_cluster.driver.port import Failure
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request
from btm_cluster.errors import MissingError, ResourcesError, Stopped
from btm_cluster.language_model.training_state import TrainingState, write_state
from btm_cluster.ledger import Artifact, Ledger
from btm_cluster.operations.plan import check_run, preview
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources, TrainRequest
from btm_cluster.steps.resuming import find_source, profiles
from btm_cluster.steps.train import train
from btm_cluster.stopping import unwinding
from btm_cluster.storage import Entry
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.workers.in_process import InProcess
from tests.conftest import in_process
from tests.integration.conftest import PreparedStore, copy_store
from tests.integration.test_training import Interrupting, Undisturbed, last_saved, run, weights_of


@pytest.fixture(scope="module")
def undisturbed(plan_with_blocks: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The seed's weights when nothing happens to it."""
    plan = copy_store(plan_with_blocks, tmp_path_factory.mktemp("undisturbed") / "store")
    prepared_store = PreparedStore(driver := in_process(plan), prepare(plan, driver))
    return weights_of(run(prepared_store, prepared_store.seed))


def folder_of(prepared_store: PreparedStore, request: TrainRequest) -> Path:
    return Path(prepared_store.driver.ledger.storage.location, "training", request.ref.identity)


def blob_of(prepared_store: PreparedStore, request: TrainRequest, name: str) -> Path:
    saved = prepared_store.driver.ledger.latest_training(request.ref.identity)
    assert saved is not None
    return folder_of(prepared_store, request) / "blobs" / saved.blob(name).sha256


def stop_after(prepared_store: PreparedStore, request: TrainRequest, updates: int) -> None:
    with pytest.raises(Stopped):
        run(prepared_store, request, Interrupting(updates))


def keep_two(prepared_store: PreparedStore, request: TrainRequest, aside: Path) -> None:
    """Checkpoints at updates 2 and 4, as a driver leaves them that is killed
    before it drops the older one."""
    stop_after(prepared_store, request, 2)
    folder = folder_of(prepared_store, request)
    shutil.copytree(folder, aside)
    stop_after(prepared_store, request, 2)
    assert last_saved(prepared_store, request) == 4
    shutil.copytree(aside, folder, dirs_exist_ok=True)


# Lost, damaged, or another's


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.safetensors", "both"])
@pytest.mark.parametrize("how", ["deleted", "cut short"])
def test_a_checkpoint_that_lost_a_file_is_passed_over_like_a_damaged_one(
    prepared_store: PreparedStore,
    undisturbed: Mapping[str, str],
    caplog: pytest.LogCaptureFixture,
    lost: str,
    how: str,
) -> None:
    """It failed that model for ever, while one with a flipped bit was passed over."""
    request = prepared_store.seed
    stop_after(prepared_store, request, 3)
    names = ["model.safetensors", "optimizer.safetensors"] if lost == "both" else [lost]
    for file in [blob_of(prepared_store, request, name) for name in names]:
        file.unlink() if how == "deleted" else file.write_bytes(file.read_bytes()[:-1])
    assert weights_of(run(prepared_store, request)) == undisturbed
    assert (
        f"passed over the training checkpoint training/{request.ref.identity}/000000003.json" in caplog.text
    )
    assert names[0] in caplog.text


@pytest.mark.parametrize(
    "trouble", ["no model", "no optimizer", "no manifest", "flipped bit", "flipped manifest"]
)
def test_where_the_newest_checkpoint_cannot_be_read_training_goes_on_from_an_older_one(
    prepared_store: PreparedStore, undisturbed: Mapping[str, str], tmp_path: Path, trouble: str
) -> None:
    request = prepared_store.seed
    keep_two(prepared_store, request, tmp_path / "aside")
    manifest = folder_of(prepared_store, request) / "000000004.json"
    file = manifest if "manifest" in trouble else blob_of(prepared_store, request, "model.safetensors")
    if trouble == "no optimizer":
        file = blob_of(prepared_store, request, "optimizer.safetensors")
    file.write_bytes(b"?" + file.read_bytes()[1:]) if "flipped" in trouble else file.unlink()
    control = Counting()
    assert weights_of(run(prepared_store, request, control)) == undisturbed
    assert control.updates == request.last_update - 2


@dataclasses.dataclass
class Counting(Undisturbed):
    updates: int = 0

    def stopping(self) -> bool:
        self.updates += 1
        return False


def test_a_checkpoint_that_could_not_be_read_does_not_stand_in_the_way_of_the_next_one_at_its_update(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    """With other resources the same update has other bytes, and the damaged
    one would have stayed for ever."""
    request = replace(prepared_store.seed, how=replace(prepared_store.seed.how, micro_batch_blocks=5))
    keep_two(prepared_store, prepared_store.seed, tmp_path / "aside")
    file = blob_of(prepared_store, request, "model.safetensors")
    file.write_bytes(b"?" + file.read_bytes()[1:])
    with pytest.raises(Stopped):
        train(request, prepared_store.driver.ledger, Interrupting(2))
    saved = prepared_store.driver.ledger.latest_training(request.ref.identity)
    assert saved is not None
    assert (saved.recipe["update"], saved.facts["how"]["micro_batch_blocks"]) == (4, 5)
    for blob in saved.blobs:
        prepared_store.driver.ledger.open_file(saved, blob.name)


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([tensor, tensor], dim=-1) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"old.{name}": tensor for name, tensor in tensors.items()}


def without_step(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "step"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", wider),
        ("model.safetensors", renamed),
        ("optimizer.safetensors", wider),
        ("optimizer.safetensors", without_step),
    ],
)
def test_a_checkpoint_of_other_shapes_or_names_is_passed_over_whole(
    prepared_store: PreparedStore,
    undisturbed: Mapping[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
) -> None:
    """Loading it may have begun: nothing of it may be left in the model that then starts again."""
    request, ledger = prepared_store.seed, prepared_store.driver.ledger
    stop_after(prepared_store, request, 3)
    saved = ledger.latest_training(request.ref.identity)
    assert saved is not None
    files = {blob.name: ledger.open_file(saved, blob.name) for blob in saved.blobs}
    save_file(change(load_file(files[name])), tmp_path / name)
    files[name] = tmp_path / name
    ledger.save_training(request, 4, files, saved.facts)
    assert weights_of(run(prepared_store, request)) == undisturbed
    assert "does not fit the model" in caplog.text


def test_another_models_checkpoint_that_was_copied_in_is_passed_over(
    prepared_store: PreparedStore, undisturbed: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(
        prepared_store.seed, training=prepared_store.seed.training.model_copy(update={"random_seed": 7})
    )
    stop_after(prepared_store, other, 3)
    shutil.copytree(folder_of(prepared_store, other), folder_of(prepared_store, prepared_store.seed))
    assert weights_of(run(prepared_store, prepared_store.seed)) == undisturbed
    assert "another" in caplog.text


def test_a_checkpoint_under_another_updates_name_is_passed_over(
    prepared_store: PreparedStore, undisturbed: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    stop_after(prepared_store, prepared_store.seed, 3)
    folder = folder_of(prepared_store, prepared_store.seed)
    (folder / "000000003.json").rename(folder / "000000005.json")
    assert weights_of(run(prepared_store, prepared_store.seed)) == undisturbed
    assert "000000005.json is another artifact's manifest" in caplog.text


# Two drivers at once


class Meanwhile(LocalFolder):
    """A store in which something happens once, right before or after an operation on a key that ends so."""

    def __init__(self, location: str, verb: str, suffix: str, act: Callable[[], None]) -> None:
        super().__init__(location)
        self._verb, self._suffix, self._act = verb, suffix, act

    def _happens(self, verb: str, key: str) -> None:
        if verb == self._verb and key.endswith(self._suffix):
            self._verb = ""
            self._act()

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        self._happens("read", key)
        return super().read(key, start, size)

    def download(self, key: str, anew: bool = False) -> Path:
        self._happens("download", key)
        found = super().download(key, anew)
        self._happens("open", key)
        return found

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = list(super().list(prefix))
        self._happens("list", prefix)
        return iter(entries)


MOMENTS = [
    ("list", "/"),
    ("read", "000000002.json"),
    ("download", "model.safetensors"),
    ("open", "model.safetensors"),
    ("open", "optimizer.safetensors"),
]


def disturbed(
    prepared_store: PreparedStore, request: TrainRequest, moment: tuple[str, str], act: Callable[[], None]
) -> Ledger:
    """The store as a second driver sees it, in which the first one does `act` at a
    moment of the second one's reading."""
    verb, at = moment
    if at.endswith(".safetensors"):
        at = blob_of(prepared_store, request, at).name
    return Ledger(Meanwhile(prepared_store.driver.ledger.storage.location, verb, at, act))


@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_a_checkpoint_that_another_driver_drops_while_it_is_read_is_followed_by_the_newer_one(
    prepared_store: PreparedStore, undisturbed: Mapping[str, str], moment: tuple[str, str]
) -> None:
    request = prepared_store.seed
    stop_after(prepared_store, request, 2)
    ledger = disturbed(prepared_store, request, moment, lambda: stop_after(prepared_store, request, 2))
    control = Counting()
    assert weights_of(train(request, ledger, control)) == undisturbed
    assert control.updates == request.last_update - 4


@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_where_another_driver_commits_and_clears_while_a_checkpoint_is_read_its_model_is_taken(
    prepared_store: PreparedStore, moment: tuple[str, str]
) -> None:
    """Else all of it would be trained once more, from the start."""
    request = prepared_store.seed
    stop_after(prepared_store, request, 2)
    made: list[Artifact] = []
    ledger = disturbed(prepared_store, request, moment, lambda: made.append(run(prepared_store, request)))
    control = Counting()
    assert train(request, ledger, control) == made[0]
    assert control.updates == 0
    assert last_saved(prepared_store, request) is None


def test_a_save_that_is_overtaken_by_another_drivers_newer_one_is_no_error(
    prepared_store: PreparedStore,
) -> None:
    request = prepared_store.seed
    stop_after(prepared_store, request, 2)
    overtaken = disturbed(
        prepared_store, request, ("read", "000000003.json"), lambda: stop_after(prepared_store, request, 2)
    )
    with pytest.raises(Stopped, match="was stopped"):
        train(request, overtaken, Interrupting(1))
    assert last_saved(prepared_store, request) == 5


def test_a_stopped_run_says_what_it_saved_and_from_where_it_goes_on(prepared_store: PreparedStore) -> None:
    ledger = prepared_store.driver.ledger
    driver = Driver(ledger, InProcess(ledger, Interrupting(2)))
    driver.made["tokens"] = 3  # as of calls before
    with pytest.raises(Stopped) as stopped:
        driver.require([prepared_store.seed])
    assert stopped.value.found == "saved: 3 finished steps; trainings under way: seed at update 1"
    assert stopped.value.remedy == "the same command goes on from there"
    assert last_saved(prepared_store, prepared_store.seed) == 1


def test_a_second_signal_that_waits_for_nothing_says_what_was_saved_before(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(prepared_store, prepared_store.seed, 2)
    driver = prepared_store.driver
    monkeypatch.setattr(driver.workers, "run", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Stopped) as stopped, unwinding():
        driver.require([prepared_store.seed])
    assert stopped.value.found == "saved: what was stored before; trainings under way: seed at update 2"


def test_a_demix_whose_last_state_another_driver_cleared_is_that_drivers(
    plan_with_blocks: Plan, tmp_path: Path
) -> None:
    plan = copy_store(plan_with_blocks, tmp_path / "store")
    driver = in_process(plan)
    request = demix_request(prepare(plan, driver))
    twin = copy_store(plan, tmp_path / "twin")
    (copied := train(request, in_process(twin).ledger, Undisturbed()))
    prepared_store = PreparedStore(driver, prepare(plan, driver))

    class Late(Undisturbed):
        """The other driver's commit and clearing come after this one's last update."""

        def report(self, progress: Any) -> None:
            if progress.phase == "storing":
                shutil.copytree(
                    Path(twin.store, "artifacts"), Path(plan.store, "artifacts"), dirs_exist_ok=True
                )
                shutil.copytree(Path(twin.store, "blobs"), Path(plan.store, "blobs"), dirs_exist_ok=True)
                driver.ledger.clear_training(request.ref.identity)

    assert train(request, driver.ledger, Late()).manifest_hash == copied.manifest_hash
    assert last_saved(prepared_store, request) is None


def test_training_never_goes_on_from_a_milestone_without_its_optimiser(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared_store.train_seed()
    request, ledger = prepared_store.transformer_lm, prepared_store.driver.ledger
    stop_after(prepared_store, request, 5)  # past the two updates of the first one
    kept = ledger.get(request.at_snapshots[0].ref)
    source = find_source(request, ledger)
    assert (source.update, source.is_checkpoint) == (11, True)
    ledger.clear_training(request.ref.identity)
    source = find_source(request, ledger)
    assert source.stored is not None
    assert (source.update, source.stored.ref) == (6, prepared_store.seed.ref)
    monkeypatch.setattr(
        "btm_cluster.steps.train.write_state", without_writing_again(kept.recipe["last_update"])
    )
    control = Counting()
    assert train(request, ledger, control).facts["tokens"] == request.tokens
    assert control.updates == 6
    assert ledger.get(kept.ref) == kept


def without_writing_again(update: int) -> Callable[..., dict[str, Path]]:
    def write(state: TrainingState, *how: Any) -> dict[str, Path]:
        assert state.update != update, "this one is in the store"
        return write_state(state, *how)

    return write


# Other resources


def with_micro_batch(request: TrainRequest, blocks: int) -> TrainRequest:
    return replace(request, how=replace(request.how, micro_batch_blocks=blocks))


def test_a_model_that_goes_on_with_other_resources_says_in_spans_of_updates_which(
    prepared_store: PreparedStore,
) -> None:
    ledger, request = prepared_store.driver.ledger, prepared_store.seed
    plain = run(prepared_store, replace(request, last_update=1)).facts["profile"]
    for updates, blocks in ((2, 4), (1, 5), (1, 5), (1, 6)):
        asked = resumed(with_micro_batch(request, blocks), ledger, new_resources=True)
        assert asked.how.micro_batch_blocks == blocks
        with pytest.raises(Stopped):
            train(asked, ledger, Interrupting(updates))
    saved = ledger.latest_training(request.ref.identity)
    assert saved is not None
    assert saved.facts["how"]["micro_batch_blocks"] == 6
    assert resumed(request, ledger).how.micro_batch_blocks == 6
    made = run(prepared_store, request)
    spans = made.facts["profile"]
    assert [(s["first_update"], s["last_update"], s["micro_batch_blocks"]) for s in spans] == [
        (0, 2, 4), (2, 4, 5), (4, 6, 6),
    ]  # fmt: skip
    assert all(span.keys() == plain.keys() | {"first_update", "last_update"} for span in spans)


def test_a_model_of_one_span_says_its_profile_as_ever_whatever_was_asked(
    prepared_store: PreparedStore,
) -> None:
    ledger, request = prepared_store.driver.ledger, prepared_store.seed
    plain = run(prepared_store, replace(request, last_update=1)).facts["profile"]
    group = {"workers": 1, "gpus_per_worker": 0.0, "cpus_per_worker": 1}
    passes = {"micro_batch_blocks": 4, "precision": "float32", "compile": False}
    assert plain == group | passes | {"torch": torch.__version__, "device": "cpu"}
    stop_after(prepared_store, request, 3)
    assert (
        train(resumed(request, ledger, new_resources=True), ledger, Undisturbed()).facts["profile"] == plain
    )


def test_a_checkpoint_of_before_that_kept_no_profile_is_gone_on_from(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    ledger, request = prepared_store.driver.ledger, prepared_store.seed
    stop_after(prepared_store, request, 3)
    saved = ledger.latest_training(request.ref.identity)
    assert saved is not None
    files = {
        blob.name: shutil.copy(ledger.open_file(saved, blob.name), tmp_path / blob.name)
        for blob in saved.blobs
    }
    facts = {name: value for name, value in saved.facts.items() if name != "profile"}
    ledger.clear_training(request.ref.identity)
    ledger.save_training(request, 3, files, facts)
    spans = train(with_micro_batch(request, 5), ledger, Undisturbed()).facts["profile"]
    assert [(s["first_update"], s["micro_batch_blocks"], s["torch"]) for s in spans] == [
        (0, 4, torch.__version__), (3, 5, torch.__version__),
    ]  # fmt: skip


def test_a_transformer_lm_that_goes_on_from_a_seed_of_other_resources_says_so(
    prepared_store: PreparedStore,
) -> None:
    prepared_store.train_seed()
    spans = run(prepared_store, with_micro_batch(prepared_store.transformer_lm, 5)).facts["profile"]
    assert [(s["first_update"], s["last_update"], s["micro_batch_blocks"]) for s in spans] == [
        (0, 6, 4),
        (6, 12, 5),
    ]


def test_spans_of_equal_profiles_are_one() -> None:
    how = Resources(1, 0.0, 1, 4, "float32", False)
    one = profiles([], 0, how, 5)["profile"]
    spans = [{"first_update": 0, "last_update": 5, **one}]
    assert profiles(spans, 5, how, 9) == {"profile": one}
    # Stopped before an update of its own.
    assert profiles(spans, 5, replace(how, workers=2), 5) == {"profile": one}
    two = profiles(spans, 5, replace(how, workers=2), 9)["profile"]
    assert [(span["last_update"], span["workers"]) for span in two] == [(5, 1), (9, 2)]


@pytest.fixture
def saved_with_four(prepared_store: PreparedStore) -> tuple[PreparedStore, Plan]:
    """A seed whose training was started with four CPUs, and its plan, which asks for two by now."""
    four = replace(prepared_store.seed, how=replace(prepared_store.seed.how, cpus_per_worker=4))
    with pytest.raises(Stopped):
        train(four, prepared_store.driver.ledger, Interrupting(3))
    torch.set_num_threads(1)
    plan = prepared_store.prepared.plan
    return prepared_store, plan.model_copy(
        update={"cluster": plan.cluster.model_copy(update={"seed_cpus": 2})}
    )


def test_a_plan_is_judged_by_what_its_checkpoints_really_ask(
    saved_with_four: tuple[PreparedStore, Plan],
) -> None:
    """The remedy was to change the plan, which changed nothing, and the doctor looked at the plan alone."""
    prepared_store, plan = saved_with_four
    seed, expert, baseline = preview(plan, prepared_store.driver.ledger).demands
    assert (seed.label, seed.how.cpus_per_worker, seed.saved_at) == ("seed", 4, 3)
    assert (expert.label, expert.how.cpus_per_worker, expert.saved_at) == ("an expert", 1, None)
    assert (baseline.label, baseline.how.cpus_per_worker, baseline.saved_at) == ("transformer-lm", 2, None)


def test_the_refusal_names_the_checkpoint_and_the_flag_that_helps(
    saved_with_four: tuple[PreparedStore, Plan],
) -> None:
    prepared_store, _ = saved_with_four
    node = {"CPU": 2.0, "GPU": 0.0}
    request = replace(prepared_store.seed, how=replace(prepared_store.seed.how, cpus_per_worker=2))
    asked = demand_of(resumed(request, prepared_store.driver.ledger))
    assert not fits([node], asked.how)
    said = str(no_capacity(asked, "the cluster", [node], "add nodes"))
    for part in ("seed", "4 CPU", "checkpoint at update 3", "2 CPU", "--new-resources"):
        assert part in said
    assert "lower" not in said, "the plan's fields have no effect"
    assert fits([node], resumed(request, prepared_store.driver.ledger, new_resources=True).how)


def test_a_step_that_failed_does_not_count_as_run(prepared_store: PreparedStore) -> None:
    driver = prepared_store.driver
    endless = replace(
        prepared_store.seed, training=prepared_store.seed.training.model_copy(update={"learning_rate": 1e300})
    )
    outcomes = driver.obtain([endless, prepared_store.seed])
    assert [type(outcome) for outcome in outcomes] == [Failure, Artifact]
    assert driver.made["model"] == 1


def test_gpus_that_this_machine_lacks_are_refused_before_a_text_is_read(fields: dict[str, Any]) -> None:
    if torch.cuda.device_count() > 3:
        pytest.skip("it has them")
    fields["cluster"] |= {"gpus_per_expert": 4}
    driver = in_process(plan := Plan.model_validate(fields))
    asking = Driver(driver.ledger, driver.workers, driver.workers.check_capacity)
    with pytest.raises(ResourcesError, match="can never hold an expert"):
        check_run(plan, asking)
    assert not Path(plan.store).exists()


def test_a_file_that_vanishes_for_good_is_missing(prepared_store: PreparedStore) -> None:
    request = prepared_store.seed
    seed = run(prepared_store, request)
    Path(
        prepared_store.driver.ledger.storage.location, "blobs", seed.blob("model.safetensors").sha256
    ).unlink()
    with pytest.raises(MissingError):
        prepared_store.driver.ledger.open_file(seed, "model.safetensors")
