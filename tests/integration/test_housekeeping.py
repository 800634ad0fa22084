"""Verifying a store, and collecting what nothing reaches: on a real forest, grown once."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from btm_cluster.algorithm import grow, merge
from btm_cluster.cli import app, run_command
from btm_cluster.errors import IntegrityError, MissingError, StoreError
from btm_cluster.ledger import Artifact, Ledger, Origin, Ref, artifact_key, blob_key, identity_by
from btm_cluster.ledger.lineage import layers, reached
from btm_cluster.ledger.records import BranchPoint, Held, hold, quarantine, settle_branch_point
from btm_cluster.operations.gc import collect, find_garbage, store_time
from btm_cluster.operations.remove import remove
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests import Start
from btm_cluster.storage.local_folder import LocalFolder
from tests.conftest import in_process, plan_fields

DAY = 86_400.0


@pytest.fixture(scope="module")
def grown(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan whose run is done, baseline and averages included."""
    fields = plan_fields(texts, tmp_path_factory.mktemp("grown") / "store") | {
        "baselines": ["transformer-lm"]
    }
    plan = Plan.model_validate(fields)
    run_plan(plan, in_process(plan))
    return plan


@pytest.fixture
def plan(grown: Plan, tmp_path: Path) -> Plan:
    """The same, with a store of the test's own."""
    shutil.copytree(grown.store, tmp_path / "store")
    return grown.model_copy(update={"store": str(tmp_path / "store")})


@pytest.fixture
def ledger(plan: Plan) -> Ledger:
    return Ledger.open(plan.store)


def let_all_be_old(store: str, days: float = 100) -> None:
    for path in Path(store).rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * DAY,) * 2)


def named(kind: str, **recipe: str) -> Origin:
    """Something that no request makes."""
    return Origin(Ref(kind, identity_by(kind, recipe, {})), recipe, {})


def all_keys(ledger: Ledger) -> set[str]:
    return {entry.key for entry in ledger.storage.list("")}


def test_a_sound_store_has_no_problems_and_all_of_it_is_read(ledger: Ledger) -> None:
    seen = verify(ledger)
    assert seen.problems == ()
    blobs = list(ledger.storage.list("blobs/"))
    assert seen.blobs == len(blobs)
    assert seen.size_bytes == sum(entry.size_bytes for entry in blobs)
    assert seen.versions == 2


def test_every_single_byte_that_is_changed_in_any_object_is_found(ledger: Ledger) -> None:
    store = Path(ledger.storage.location)
    chosen = [p for folder in ("artifacts/model", "artifacts/scores", "artifacts/text", "blobs", "forest")
              for p in sorted((store / folder).glob("*"))[:4] if p.stat().st_size]  # fmt: skip
    for number, path in enumerate(chosen):
        whole = path.read_bytes()
        at = (number * 7919) % len(whole)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        seen = verify(ledger)
        assert seen.problems, f"{path}, byte {at}"
        path.write_bytes(whole)
    assert verify(ledger).problems == ()


def test_every_byte_of_a_manifest_counts(ledger: Ledger) -> None:
    path = next(Path(ledger.storage.location, "artifacts/model").glob("*.json"))
    ref, whole = Ref("model", path.stem), path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(IntegrityError):
            ledger.find(ref)
    path.write_bytes(whole)
    assert ledger.find(ref) is not None


def test_what_is_lost_cut_short_or_too_long_is_named(ledger: Ledger) -> None:
    forest = ledger.log.newest()
    assert forest is not None
    store = Path(ledger.storage.location)
    weights = ledger.get(Ref("model", forest.experts[0].identity)).blob("model.safetensors").sha256
    whole = (store / "blobs" / weights).read_bytes()
    for damaged in (whole[:-1], whole + b"x"):
        (store / "blobs" / weights).write_bytes(damaged)
        assert any(weights in problem or "longer" in problem for problem in verify(ledger).problems)
    (store / "blobs" / weights).unlink()
    assert any(weights in problem for problem in verify(ledger).problems)
    (store / "blobs" / weights).write_bytes(whole)
    (store / f"artifacts/model/{forest.experts[0].identity}.json").unlink()
    assert any("names model" in problem and "no manifest" in problem for problem in verify(ledger).problems)


def only_problem(ledger: Ledger) -> str:
    (problem,) = verify(ledger).problems
    return problem


def test_versions_without_the_first_or_with_a_gap_are_a_problem(ledger: Ledger) -> None:
    store = Path(ledger.storage.location)
    forest = ledger.log.newest()
    assert forest is not None
    for version in (2, 3):
        ledger.log.append(replace(forest, version=version, parent=None))
    for version in (0, 2):
        whole = (store / f"forest/{version:06d}.json").read_bytes()
        (store / f"forest/{version:06d}.json").unlink()
        assert f"forest version {version} is missing" in only_problem(ledger)
        (store / f"forest/{version:06d}.json").write_bytes(whole)
    assert verify(ledger).problems == ()
    shutil.copy(store / "forest/000001.json", store / "forest/000009.json")
    problems = verify(ledger).problems
    assert any("forest/000009.json" in problem for problem in problems)
    assert any("forest version 4 to 8 is missing" in problem for problem in problems)


def test_a_version_of_a_monstrous_number_is_named_like_any_other(ledger: Ledger) -> None:
    store = Path(ledger.storage.location)
    shutil.copy(store / "forest/000001.json", store / f"forest/{10**200}.json")
    assert any("forest version 2 to 9" in problem for problem in verify(ledger).problems)


def test_pins_are_read_and_their_versions_must_be_there(ledger: Ledger) -> None:
    store = Path(ledger.storage.location)
    ledger.pin(1)
    assert verify(ledger).problems == ()
    shutil.copy(store / "pins/000001.json", store / "pins/000000.json")
    assert "pins/000000.json" in only_problem(ledger)
    (store / "pins/000000.json").unlink()
    ledger.documents.create("pins/000007.json", {"version": 7})
    assert "forest version 7 is missing" in only_problem(ledger)
    (store / "pins/000007.json").write_bytes(b"")
    assert "pins/000007.json" in only_problem(ledger)


@pytest.mark.parametrize("kind", ["text", "tokenizer", "tokens"])
def test_an_artifact_that_a_kept_one_needs_and_that_is_gone_is_a_problem(ledger: Ledger, kind: str) -> None:
    forest = ledger.log.newest()
    assert forest is not None
    expert = ledger.get(Ref("model", forest.experts[0].identity))
    scores = next(
        scores for scores in ledger.list_artifacts("scores") if scores.inputs["model"] == (expert.ref,)
    )
    (lost, *_) = {
        "text": expert.inputs["texts"],
        "tokenizer": expert.inputs["tokenizer"],
        "tokens": scores.inputs["tokens"],
    }[kind]
    Path(ledger.storage.address(artifact_key(lost))).unlink()
    problems = verify(ledger).problems
    assert any(f"{kind} {lost.identity[:12]} is missing" in problem for problem in problems)


@pytest.mark.parametrize("folder", ["artifacts/text", "forest", "pins"])
def test_a_link_that_leads_nowhere_is_a_problem(ledger: Ledger, folder: str) -> None:
    ledger.pin(1)
    last = sorted(Path(ledger.storage.location, folder).iterdir())[-1]
    last.unlink()
    last.symlink_to("nowhere")
    assert any(last.name in problem and "cannot be read" in problem for problem in verify(ledger).problems)


def test_the_text_of_a_target_is_needed_by_what_read_it_alone(ledger: Ledger) -> None:
    trained = {text for model in ledger.list_artifacts("model") for text in model.inputs.get("texts", ())}
    target = next(text for text in ledger.list_artifacts("text") if text.ref not in trained)
    Path(ledger.storage.address(artifact_key(target.ref))).unlink()
    assert any(f"text {target.identity[:12]} is missing" in problem for problem in verify(ledger).problems)


def test_what_is_none_of_the_stores_is_noted_is_no_problem_and_is_never_collected(
    plan: Plan, ledger: Ledger
) -> None:
    store = Path(plan.store)
    folders = [
        "forest",
        "artifacts/model",
        "artifacts/later-kind",
        "blobs",
        "pins",
        "quarantine",
        "inbox",
        "training",
    ]
    strays = {
        f"{folder}/{name}" for folder in folders for name in (".DS_Store", "000001.json~", "#x#", ".nfs01")
    }
    for key in strays:
        (store / key).parent.mkdir(parents=True, exist_ok=True)
        (store / key).write_bytes(b"what an editor left")
    let_all_be_old(plan.store)
    seen = verify(ledger)
    assert seen.problems == ()
    assert len(seen.notes) == len(strays)
    assert all(any(repr(key) in note for note in seen.notes) for key in strays)
    found = find_garbage(ledger, keep_versions=1, grace_seconds=DAY)
    assert found.manifests
    collect(ledger, found)
    assert all((store / key).exists() for key in strays)


def test_what_a_killed_process_was_writing_is_collected_once_it_is_old(plan: Plan, ledger: Ledger) -> None:
    keys = [
        f"{folder}/.writing-{'0123456789abcdef' * 2}"
        for folder in ("blobs", "artifacts/model", "forest", "logs/run")
    ]
    for key in keys:
        Path(plan.store, key).parent.mkdir(parents=True, exist_ok=True)
        Path(plan.store, key).write_bytes(b"ha")
    assert find_garbage(ledger, 10, DAY).unfinished == ()
    let_all_be_old(plan.store)
    found = find_garbage(ledger, 10, DAY)
    assert set(keys) == set(found.unfinished)
    collect(ledger, found)
    assert not any(Path(plan.store, key).exists() for key in keys)
    assert verify(ledger).problems == ()


def test_a_kind_of_a_newer_version_is_not_collected_nor_what_it_may_need(plan: Plan, ledger: Ledger) -> None:
    ledger.commit(named("distilled", of="a later version"), {}, {})
    let_all_be_old(plan.store)
    assert verify(ledger).problems == ()
    with pytest.raises(StoreError, match="artifacts/distilled/") as refused:
        find_garbage(ledger, 1, DAY)
    assert "newer" in refused.value.remedy


@pytest.mark.parametrize("how", ["deleted", "a folder", "renamed", "behind a linked folder"])
def test_nothing_is_collected_while_a_model_of_the_forest_has_lost_its_manifest(
    how: str, plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    """Its files would go, as named by nobody; and a manifest from a backup would then name nothing."""
    forest = ledger.log.newest()
    assert forest is not None
    manifest = Path(plan.store, artifact_key(Ref("model", forest.experts[0].identity)))
    match how:
        case "behind a linked folder":
            manifest.parent.rename(tmp_path / "other-disk")
            manifest.parent.symlink_to(tmp_path / "other-disk")
        case "renamed":
            manifest.rename(manifest.with_suffix(".bak"))
        case _:
            manifest.unlink()
    if how == "a folder":
        manifest.mkdir()
    let_all_be_old(plan.store)
    # There it is any of them.
    identity = "" if how == "behind a linked folder" else forest.experts[0].identity[:12]
    with pytest.raises(StoreError, match=f"forest version 1 names model {identity}") as refused:
        find_garbage(ledger, keep_versions=1, grace_seconds=DAY)
    assert "forest remove" in refused.value.remedy
    # A store without that domain is collected again: its expert is named by an older version alone.
    if how != "behind a linked folder":
        remove(ledger, forest.experts[0].domain)
        assert find_garbage(ledger, keep_versions=1, grace_seconds=DAY).blobs


def test_a_collection_deletes_what_is_made_before_what_it_is_made_from(plan: Plan, ledger: Ledger) -> None:
    forest = ledger.log.newest()
    assert forest is not None
    ledger.log.append(replace(forest, version=2, experts=(), manifests={}, parent=None))
    shutil.rmtree(Path(plan.store, "baselines"))
    let_all_be_old(plan.store)
    found = find_garbage(ledger, 1, DAY)
    deleted: list[str] = []

    class Remembering(LocalFolder):
        def delete(self, key: str) -> None:
            deleted.append(key)
            super().delete(key)

    manifests = ledger.read_manifests(found.manifests)
    collect(Ledger(Remembering(plan.store)), found)
    gone: set[Ref] = set()
    for key in deleted:
        if key in manifests:
            assert gone.isdisjoint(manifests[key].needs), key
            gone.add(manifests[key].ref)
    assert len({ref.kind for ref in gone}) > 5
    assert len(layers(manifests)) > 3


@pytest.fixture
def read_only(grown: Plan) -> Iterator[str]:
    """A store that nobody may write to, where somebody else than root can see it."""
    with tempfile.TemporaryDirectory() as folder:
        store, user = Path(folder, "store"), os.geteuid()
        shutil.copytree(grown.store, store)
        Path(folder).chmod(0o755)
        folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
        for one in folders:
            one.chmod(0o555)
        try:
            yield str(store)
        finally:
            os.seteuid(user)
            for one in folders:
                one.chmod(0o755)


@pytest.mark.parametrize("command", ["gc", "verify", "show", "log"])
def test_a_store_that_cannot_be_written_can_be_looked_at(
    read_only: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def look() -> int:
        return run_command(lambda: app(["forest", command, "--store", read_only]))

    assert look() == 0  # and everything is imported, which the other user may not read
    capsys.readouterr()
    os.seteuid(os.geteuid() or 65534)  # who is root writes everything
    with pytest.raises(StoreError, match="cannot create"):
        store_time(Ledger.open(read_only).storage)
    assert look() == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    if command == "gc":
        assert "would delete" in shown.out


def test_verifying_a_place_where_no_store_is_does_not_find_it_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A schedule with a slip in its `--store` would be content for ever."""
    assert run_command(lambda: app(["forest", "verify", "--store", str(tmp_path / "slip")])) == 2
    assert "nothing of a forest" in capsys.readouterr().err


def test_a_store_of_models_without_any_forest_version_is_told_of(plan: Plan, ledger: Ledger) -> None:
    """A study keeps no versions, so it is no damage; who knows that there was a
    forest hears that its log is gone."""
    for path in Path(plan.store, "forest").glob("*.json"):
        path.unlink()
    assert "no forest version" in " ".join(verify(ledger).notes)


def test_a_collection_without_delete_writes_nothing_and_says_whose_clock_it_goes_by(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    let_all_be_old(plan.store)
    before = os.stat(plan.store).st_mtime_ns
    assert run_command(lambda: app(["forest", "gc", "--store", plan.store])) == 0
    assert "this machine's clock" in capsys.readouterr().out
    assert os.stat(plan.store).st_mtime_ns == before
    assert not Path(plan.store, "clock").exists()


def test_nothing_young_is_garbage(ledger: Ledger) -> None:
    ledger.storage.create("blobs/" + "0" * 64, b"an upload whose manifest is still to come")
    found = find_garbage(ledger, keep_versions=1, grace_seconds=DAY)
    assert (found.manifests, found.blobs) == ((), ())


def test_of_what_is_old_only_averages_and_their_scores_and_what_has_no_manifest_go(
    plan: Plan, ledger: Ledger
) -> None:
    orphan = "blobs/" + "0" * 64
    ledger.storage.create(orphan, b"an upload whose manifest never came")
    ledger.storage.create("inbox/news/a.jsonl", b"text that has arrived")
    let_all_be_old(plan.store)
    before = all_keys(ledger)
    found = find_garbage(ledger, keep_versions=10, grace_seconds=DAY)
    assert orphan in found.blobs
    assert set(found.kinds) == {"model", "scores"}  # their fits are made of what stays
    gone = [ledger.read_manifest(key) for key in found.manifests]
    averages = {a.identity for a in gone if a is not None and a.facts.get("role") == "average"}
    assert {a.identity for a in gone if a is not None and a.kind == "model"} == averages
    assert {m.identity for a in gone if a and a.kind == "scores" for m in a.inputs["model"]} == averages
    assert all_keys(ledger) == before, "finding deletes nothing"
    collect(ledger, found)
    assert all_keys(ledger) == before - {*found.manifests, *found.blobs}
    assert verify(ledger).problems == ()
    assert find_garbage(ledger, 10, DAY).manifests == ()
    again = run_plan(plan, driver := in_process(plan))
    assert set(again.made) == {"model", "scores"}
    assert driver.made["model"] == len(averages)


def test_experts_of_versions_that_are_not_kept_go_unless_they_are_pinned(plan: Plan, ledger: Ledger) -> None:
    grown = ledger.log.newest()
    assert grown is not None
    for version in (2, 3):  # as a removal would make it
        last = ledger.log.newest()
        assert last is not None
        manifests = {grown.foundation.seed: grown.manifests[grown.foundation.seed]}
        ledger.log.append(type(grown)(version, grown.foundation, (), manifests, reason="removed all"))
    let_all_be_old(plan.store)
    experts = {f"artifacts/model/{expert.identity}.json" for expert in grown.experts}
    assert experts <= set(find_garbage(ledger, keep_versions=2, grace_seconds=DAY).manifests)
    assert not experts & set(find_garbage(ledger, keep_versions=3, grace_seconds=DAY).manifests)
    ledger.pin(1)
    assert not experts & set(find_garbage(ledger, keep_versions=2, grace_seconds=DAY).manifests)
    ledger.unpin(1)
    collect(ledger, find_garbage(ledger, keep_versions=2, grace_seconds=DAY))
    assert not experts & all_keys(ledger)
    seed = f"artifacts/model/{grown.foundation.seed}.json"
    assert seed in all_keys(ledger)


def test_a_training_in_the_making_keeps_its_checkpoint_and_what_it_is_made_from(
    plan: Plan, ledger: Ledger
) -> None:
    forest = ledger.log.newest()
    assert forest is not None
    expert = ledger.get(Ref("model", forest.experts[0].identity))
    ledger.log.append(type(forest)(2, forest.foundation, (), {}, reason="as if nothing were kept"))
    let_all_be_old(plan.store)
    weights = ledger.open_file(expert, "model.safetensors")
    recipe = dict(expert.recipe) | {"last_update": 10**6}
    longer = Origin(Ref("model", identity_by("model", recipe, expert.inputs)), recipe, expert.inputs)
    ledger.save_training(longer, 7, {"model.safetensors": weights}, {"how": {}})
    found = set(find_garbage(ledger, keep_versions=1, grace_seconds=DAY).manifests)
    assert Ref("model", forest.foundation.seed) in expert.made_from
    assert not set(map(artifact_key, expert.made_from)) & found
    assert not any(key.startswith("training/") for key in found)
    assert any(key.startswith("artifacts/model/") for key in found)
    let_all_be_old(plan.store)
    abandoned = find_garbage(ledger, keep_versions=1, grace_seconds=DAY)
    assert f"training/{longer.ref.identity}/000000007.json" in abandoned.manifests
    assert any(key.startswith("training/") for key in abandoned.blobs)


def test_a_line_of_descent_may_be_longer_than_pythons_stack() -> None:
    def model(number: int) -> Artifact:
        models = (Ref("model", str(number - 1)),) if number else ()
        return Artifact("model", str(number), {}, {"models": models}, (), {}, {}, (), "")

    models = {one.ref: one for one in map(model, range(3000))}
    assert reached([Ref("model", "2999")], models) == set(models)
    assert layers({ref.identity: one for ref, one in models.items()}) == [
        [str(n)] for n in reversed(range(3000))
    ]


def test_an_expansion_in_the_making_keeps_what_its_expert_starts_from_however_old_it_is(
    plan: Plan, ledger: Ledger
) -> None:
    forest = ledger.log.newest()
    assert forest is not None
    kitchen, harbour = forest.expert("kitchen"), forest.expert("harbour")
    ledger.log.append(
        type(forest)(2, forest.foundation, (), {}, reason="as if nothing were kept", withdrawn=("harbour",))
    )
    averages = [
        m
        for m in ledger.list_artifacts("model")
        if Ref("model", kitchen.identity) in m.inputs.get("models", ())
    ]
    start = Start(averages[0].ref, False)
    settled = settle_branch_point(
        ledger, BranchPoint("news", kitchen.text, forest.foundation.seed, 1, "", start, "")
    )
    let_all_be_old(plan.store)
    kept = {Ref("model", kitchen.identity), averages[0].ref, Ref("text", kitchen.text), *averages[0].needs}
    found = find_garbage(ledger, keep_versions=1, grace_seconds=DAY)
    assert not set(map(artifact_key, kept)) & set(found.manifests)
    assert artifact_key(averages[1].ref) in found.manifests
    assert (
        f"artifacts/model/{harbour.identity}.json" in found.manifests
        or harbour.identity in averages[0].parents
    )
    hold(ledger, Held(settled.identity, "0" * 64, 1, 0.5, "worse"))
    quarantine(ledger, "bad", "1" * 64, "a link")
    gone = {"domain": "gone", "kind": "text", "identity": "2" * 64, "parents": []}
    ledger.documents.create(f"tombstones/text/{'2' * 64}.json", gone)
    let_all_be_old(plan.store)
    collect(ledger, find_garbage(ledger, keep_versions=1, grace_seconds=DAY))
    records = {
        key
        for key in all_keys(ledger)
        if key.startswith(("expansions/", "held/", "quarantine/", "tombstones/"))
    }
    assert len(records) == 4
    assert verify(ledger).problems == ()
    damaged = Path(plan.store, sorted(records)[0])
    damaged.write_bytes(damaged.read_bytes().replace(b"news", b"gnus"))
    assert len(verify(ledger).problems) == 1


def test_a_blob_that_is_named_anew_before_it_is_deleted_stays(
    plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"bytes that come back")
    first, second = named("model", name="first"), named("model", name="second")
    made = ledger.commit(first, {"w": tmp_path / "file"}, {})
    ledger.storage.delete(artifact_key(first.ref))
    let_all_be_old(plan.store)
    found = find_garbage(ledger, keep_versions=10, grace_seconds=DAY)
    key = blob_key(made.ref, made.blob("w").sha256)
    assert key in found.blobs
    ledger.commit(second, {"w": tmp_path / "file"}, {})
    collect(ledger, found)
    assert key in all_keys(ledger)


def test_ages_are_taken_by_the_clock_of_the_store(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert abs(store_time(ledger.storage) - now) < 600
    assert not any(entry.key.startswith("clock/") for entry in ledger.storage.list(""))


def test_a_merge_finds_out_that_an_artifact_was_collected(plan: Plan, tmp_path: Path) -> None:
    fresh = plan.model_copy(update={"store": str(tmp_path / "fresh"), "domains": plan.domains[:1]})
    driver = in_process(fresh)
    forest = grow(fresh, driver).forest
    weights = driver.ledger.get(Ref("model", forest.experts[0].identity)).blob("model.safetensors").sha256
    Path(fresh.store, "forest/000001.json").unlink()
    Path(fresh.store, "blobs", weights).unlink()
    founded = driver.ledger.log.newest()
    assert founded is not None
    assert founded.version == 0
    with pytest.raises(MissingError, match="lost its file"):
        merge(founded, forest.experts, driver.ledger)
    assert driver.ledger.log.versions() == [0]
