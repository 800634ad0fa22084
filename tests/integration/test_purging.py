"""Purging and collecting on a store of every kind of artifact, made without
training: what goes, and what a kill leaves behind."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.algorithm import merge
from btm_cluster.errors import MissingError, StoreError, UserError
from btm_cluster.ledger import Ledger, PurgeRecord, artifact_key
from btm_cluster.ledger.purge import plan_purge, purge
from btm_cluster.ledger.tombstones import Tombstones
from btm_cluster.operations.gc import collect, find_garbage
from btm_cluster.operations.remove import influence_of, planned_purge
from btm_cluster.operations.remove import purge as purge_domain
from btm_cluster.operations.rollback import rollback
from btm_cluster.operations.verify import verify
from btm_cluster.steps.stored import base_of
from tests.house import House
from tests.memory_store import Crash, InMemory, without_threads

GRACE_SECONDS = 10.0


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    without_threads(monkeypatch)


class HouseInMemory(House):
    """With its store at hand."""

    def __init__(self, folder: Path) -> None:
        self.memory = InMemory(folder)
        super().__init__(self.memory, folder)

    def holding(self, trace: str) -> set[str]:
        """The objects whose bytes hold a trace."""
        return {key for key, (data, _) in self.memory.objects.items() if trace.encode() in data}


@pytest.fixture
def house(tmp_path: Path) -> HouseInMemory:
    house = HouseInMemory(tmp_path)
    house.found()
    house.live()
    assert verify(house.ledger).problems == ()
    return house


@pytest.fixture
def full(house: HouseInMemory) -> HouseInMemory:
    house.fill()
    house.remove("law")
    assert verify(house.ledger).problems == ()
    return house


def test_an_average_whose_weights_were_fitted_on_a_purged_text_goes_though_none_of_its_experts_does(
    house: HouseInMemory,
) -> None:
    """Averages were found by their labels and parents: this one has none of either."""
    scores = [house.score(model, "law") for model in ("code expert", "seed")]
    house.commit("other fit", "fit", {"models": ["code expert", "seed"], "scores": scores, "for_all": []})
    house.commit(
        "the best of all", "model", {"models": ["code expert", "seed"], "fit": ["other fit"]}, role="average"
    )
    house.commit("another", "model", {"models": ["code expert", "seed"], "fit": []}, role="average")
    ties = house.commit("ties", "model", {"models": ["code expert", "law expert"], "base": ["seed"]})
    assert set(ties.parents) == {house.refs[name].identity for name in ("code expert", "law expert", "seed")}
    house.remove("law")
    purge(house.ledger, plan_purge(house.ledger, "law"))
    assert not house.is_there("the best of all")
    assert not house.is_there("other fit")
    assert not house.is_there("ties"), "a merge against the seed is made of its experts"
    assert house.is_there("another")
    assert verify(house.ledger).problems == ()


def test_with_a_text_goes_what_is_made_of_it_but_not_what_learned_from_others_too_nor_descendants(
    full: HouseInMemory,
) -> None:
    purge(full.ledger, plan_purge(full.ledger, "law"))
    gone = {name for name in full.refs if name and not full.is_there(name)}
    assert gone == {
        *("law text", "law source", "law tokens", "law expert", "law part", "overlap", "soup", "seed on law"),
        *(f"law expert on {text}" for text in ("law", "code", "news")),
        "code expert on law",
        *(f"{made} for {text}" for made in ("fit", "mixture", "average") for text in ("law", "code", "news")),
    }
    for trace in ("law expert", "checkpoint of law", "law text", "inbox/law/", "run/law", "7" * 64):
        assert {key.partition("/")[0] for key in full.holding(f"bytes of {trace}")} <= {"tombstones"}
    assert full.memory.objects.keys() >= {
        "inbox/lawyers/a.txt",
        "logs/run/code/curves",
        "logs/run/timeline.json",
    }
    assert full.memory.objects.keys().isdisjoint({"logs/run/report.html", "logs/run of law/timeline.json"})
    # Whoever comes back to poems starts from another average: that one went.
    assert [
        key.partition("/")[0] for key in full.memory.objects if key.startswith(("expansions/", "held/"))
    ] == ["expansions"]
    assert verify(full.ledger).problems == ()
    assert find_garbage(full.ledger, 10, GRACE_SECONDS).manifests == ()


def test_a_model_that_was_trained_on_one_text_alone_and_is_no_expert_stays(tmp_path: Path) -> None:
    """A forest that was founded on one domain keeps its seed and tokenizer, as
    any other does: its experts need them."""
    house = HouseInMemory(tmp_path)
    house.commit("law text", "text", {})
    house.commit("tokenizer", "tokenizer", {"texts": ["law text"]})
    house.read("law")
    house.train("seed", ["law"], "seed")
    house.read("code")
    house.train("code expert", ["code"], "expert", ("seed",))
    purge(house.ledger, plan_purge(house.ledger, "law"))
    assert all(map(house.is_there, ("tokenizer", "seed", "code tokens", "code expert")))
    assert not house.is_there("law tokens")


def kept_keys(storage: InMemory) -> set[str]:
    """All but what records a purge: who purges again writes down what was left."""
    return {key for key in storage.objects if not key.startswith(("tombstones/purge/", "tombstones/purged/"))}


def copy_of(storage: InMemory) -> InMemory:
    copied = InMemory(storage.folder)
    copied.objects, copied.now = dict(storage.objects), storage.now
    return copied


def purge_law(storage: InMemory) -> None:
    ledger = Ledger(storage)
    purge(ledger, plan_purge(ledger, "law"))


def collect_all(storage: InMemory) -> None:
    ledger = Ledger(storage)
    collect(ledger, find_garbage(ledger, 1, GRACE_SECONDS))


def kills(storage: InMemory, act: Callable[[InMemory], None]) -> Iterator[tuple[int, InMemory]]:
    """The store as it is left by whoever is killed before each of its operations in turn."""
    operation = 0
    while True:
        operation += 1
        killed = copy_of(storage)
        killed.arm(operation, before=killed.crash)
        try:
            act(killed)
        except Crash:
            killed.arm(0)
            yield operation, killed
        else:
            return


def test_a_purge_that_is_killed_at_any_operation_ends_like_any_other_when_it_is_run_again(
    full: HouseInMemory,
) -> None:
    undisturbed = copy_of(full.memory)
    purge_law(undisturbed)
    expected, operations = kept_keys(undisturbed), 0
    for operation, killed in kills(full.memory, purge_law):
        operations = operation
        begun = any(key.startswith("tombstones/") for key in killed.objects)
        is_done = not Ledger(killed).tombstones.unfinished()
        problems = verify(Ledger(killed)).problems
        assert bool(problems) == (begun and not is_done), (operation, problems)
        purge_law(killed)
        assert kept_keys(killed) == expected, operation
        assert Ledger(killed).tombstones.unfinished() == []
        assert verify(Ledger(killed)).problems == (), operation
    assert operations > 100


def test_a_collection_that_is_killed_at_any_operation_ends_like_any_other_when_it_is_run_again(
    house: HouseInMemory,
) -> None:
    for domain in ("law", "code"):
        house.remove(domain)
    house.storage.create("blobs/" + "0" * 64, b"an upload whose manifest never came")
    house.memory.now += 2 * GRACE_SECONDS
    undisturbed = copy_of(house.memory)
    collect_all(undisturbed)
    assert len(undisturbed.objects) < len(house.memory.objects) - 20
    operations = 0
    for operation, killed in kills(house.memory, collect_all):
        operations = operation
        assert verify(Ledger(killed)).problems == (), operation
        killed.now += 2 * GRACE_SECONDS  # what it left of its clock grows old
        collect_all(killed)
        assert killed.objects.keys() == undisturbed.objects.keys(), operation
        assert verify(Ledger(killed)).problems == (), operation
    assert operations > 100


def test_an_unfinished_purge_is_told_with_what_is_left_of_it_and_blobs_go_whose_manifests_are_gone(
    full: HouseInMemory,
) -> None:
    purge_plan = plan_purge(full.ledger, "law")
    full.ledger.tombstones.begin(purge_plan.to_record())
    for key in purge_plan.manifests:
        full.storage.erase(key)
    assert full.holding("bytes of law text"), "its bytes are in a blob that nothing names"
    (problem,) = verify(full.ledger).problems
    assert "the purge of 'law' is not finished" in problem
    assert "btm forest remove law --purge" in problem
    again = plan_purge(full.ledger, "law")
    assert again.blobs == purge_plan.blobs
    assert again.size_bytes == purge_plan.size_bytes
    purge(full.ledger, again)
    assert not full.holding("bytes of law text")
    assert verify(full.ledger).problems == ()


def test_a_purge_run_again_leaves_a_blob_that_somebody_names_by_now(full: HouseInMemory) -> None:
    purge_plan = plan_purge(full.ledger, "law")
    full.ledger.tombstones.begin(purge_plan.to_record())
    for key in purge_plan.manifests:
        full.storage.erase(key)
    same_bytes = full.files("law tokens")
    copied = full.ledger.commit(full.origin("a copy", "tokenizer", {}), same_bytes, {})
    purge_law(full.memory)
    assert [full.ledger.open_file(copied, blob.name).read_bytes() for blob in copied.blobs]
    assert verify(full.ledger).problems == ()


# Purged while something of it is made


def commit_late(house: HouseInMemory) -> None:
    """Another expert of law, with scores under it and a checkpoint on its way."""
    house.ledger.save_training(
        house.origin("late", "model", house.training(["law"], ("seed",))), 5, house.files("late"), {}
    )
    house.train("late", ["law"], "expert", ("seed",))
    house.score("late", "code")
    house.score("seed", "law")


def of_law_since(house: HouseInMemory) -> set[str]:
    names = ("late", "late on code", "seed on law")
    held = {key for name in names for key in house.holding(f"bytes of {name}")}
    return held | {
        artifact_key(house.refs[name]) for name in names if name in house.refs and house.is_there(name)
    }


def test_whatever_is_committed_while_its_domain_is_purged_is_refused_and_nothing_of_it_stays(
    house: HouseInMemory,
) -> None:
    house.remove("law")
    start, refs, operation, reached = house.memory.objects, dict(house.refs), 0, True
    refused = 0
    while reached:
        operation += 1
        house.memory.objects, house.refs = dict(start), dict(refs)
        done: list[bool] = []
        house.memory.arm(operation, before=lambda done=done: (done.append(True), purge_law(house.memory)))
        try:
            commit_late(house)
        except UserError:
            refused += 1
        except StoreError:
            assert done, operation  # a checkpoint's folder was erased under its hands
        house.memory.arm(0)
        reached = bool(done)
        if reached:
            assert of_law_since(house) == set(), operation
            assert verify(house.ledger).problems == (), operation
    assert refused > 10


def test_a_purge_in_whose_midst_something_of_its_domain_is_committed_deletes_or_refuses_it(
    house: HouseInMemory,
) -> None:
    house.remove("law")
    start, refs, operation, reached = house.memory.objects, dict(house.refs), 0, True
    while reached:
        operation += 1
        house.memory.objects, house.refs = dict(start), dict(refs)
        done: list[bool] = []

        def interrupt(done: list[bool] = done) -> None:
            done.append(True)
            with suppress(UserError, StoreError):
                commit_late(house)

        house.memory.arm(operation, before=interrupt)
        purge_law(house.memory)
        house.memory.arm(0)
        reached = bool(done)
        assert of_law_since(house) == set(), operation
        assert verify(house.ledger).problems == (), operation


def test_what_shares_its_bytes_with_others_is_withdrawn_without_them(house: HouseInMemory) -> None:
    house.remove("law")
    purge_law(house.memory)
    with pytest.raises(UserError, match="this text"):
        house.train("late", ["law"], "expert", ("seed",))
    assert not house.is_there("late")
    assert house.holding("everybody's")
    assert not house.holding("bytes of late")
    assert verify(house.ledger).problems == ()


def test_a_random_split_of_a_purged_text_goes_with_its_reading(house: HouseInMemory) -> None:
    house.remove("law")
    purge_law(house.memory)
    house.commit("split text", "text", {})
    with pytest.raises(UserError, match="was purged"):
        house.commit("split", "source", {"texts": ["law text", "code text"]}, ("split text",))
    assert not house.is_there("split text")
    assert not house.holding("bytes of split text")


def test_an_expert_whose_text_was_purged_is_not_merged_though_it_is_there(house: HouseInMemory) -> None:
    newest = house.remove("law")
    house.ledger.tombstones.begin(plan_purge(house.ledger, "law").to_record())
    with pytest.raises(UserError, match="was purged from the store"):
        merge(newest, [replace(house.expert("law", "seed"), domain="statutes")], house.ledger)
    assert house.ledger.log.versions()[-1] == newest.version


def test_a_merge_in_whose_midst_its_domain_is_purged_is_refused_or_told_by_verify(
    house: HouseInMemory,
) -> None:
    house.read("poems")
    house.train("poems expert", ["poems"], "expert", ("seed",))
    start, operation, reached, refused = house.memory.objects, 0, True, 0
    while reached:
        operation += 1
        house.memory.objects = dict(start)
        done: list[bool] = []

        def interrupt(done: list[bool] = done) -> None:
            done.append(True)
            ledger = Ledger(house.memory)
            purge(ledger, plan_purge(ledger, "poems"))

        house.memory.arm(operation, before=interrupt)
        try:
            house.merge(house.expert("poems", "seed"))
        except (UserError, StoreError):
            refused += 1
        house.memory.arm(0)
        reached = bool(done)
        newest = house.ledger.log.newest()
        assert newest is not None
        stands = reached and "poems" in newest.domains
        assert bool(verify(house.ledger).problems) == stands, operation
    assert refused > 3


def test_what_is_made_of_a_purged_text_is_told_by_verify_and_goes_when_it_is_purged_again(
    house: HouseInMemory,
) -> None:
    """Put there by a version that did not look, or from a backup."""
    house.remove("law")
    before = dict(house.memory.objects)
    purge_law(house.memory)
    house.memory.objects |= {key: data for key, data in before.items() if key.startswith("blobs/")}
    back = [artifact_key(house.refs[name]) for name in ("average for code", "law tokens", "seed on law")]
    house.memory.objects |= {key: before[key] for key in back}
    problems = verify(house.ledger).problems
    assert f"{back[0]} was purged, and is there again" in problems
    assert [any(f"{key} is made from what was purged as 'law'" in p for p in problems) for key in back] == [
        False,
        True,
        True,
    ]
    purge_law(house.memory)
    assert not house.memory.objects.keys() & {*back}
    assert verify(house.ledger).problems == ()


def test_a_forest_that_names_what_was_purged_is_a_problem(house: HouseInMemory) -> None:
    purge_law(house.memory)
    assert any(
        "the forest has the domain 'law', which was purged" in problem
        for problem in verify(house.ledger).problems
    )
    house.remove("law")
    assert verify(house.ledger).problems == ()


# What a collection keeps, and when it refuses


def test_what_the_newest_version_needs_is_kept_with_its_scores_and_what_is_made_of_these_but_no_average(
    full: HouseInMemory,
) -> None:
    full.memory.now += 2 * GRACE_SECONDS
    keys = set(find_garbage(full.ledger, 1, GRACE_SECONDS).manifests)
    gone = {name for name, ref in full.refs.items() if artifact_key(ref) in keys}
    # Law is out of the newest version. The open branch point of poems needs the average for law, and that its
    # experts and fit.
    assert gone == {"average for code", "average for news"}
    kept_of_older = {
        name for name, ref in full.refs.items() if "law expert" in name and artifact_key(ref) not in keys
    }
    assert "law expert" in kept_of_older


def test_a_rival_is_kept_by_its_record_alone(house: HouseInMemory) -> None:
    house.train("another demix", ["law", "code"], "demix")
    house.memory.now += 2 * GRACE_SECONDS
    keys = set(find_garbage(house.ledger, 10, GRACE_SECONDS).manifests)
    assert artifact_key(house.refs["another demix"]) in keys
    assert not keys & {
        artifact_key(house.refs[name]) for name in ("transformer-lm", "demix", "law part", "code part")
    }


@pytest.mark.parametrize(
    "lost",
    [
        "news expert",
        "transformer-lm",
        "law part",
        "code text",
        "tokenizer",
        "code tokens",
        "average for law",
        "poems text",
    ],
)
def test_nothing_is_collected_while_something_that_is_named_or_needed_is_lost(
    full: HouseInMemory, lost: str
) -> None:
    full.memory.now += 2 * GRACE_SECONDS
    del full.memory.objects[artifact_key(full.refs[lost])]
    with pytest.raises(StoreError, match=f"{full.refs[lost].identity[:12]}, whose files would be deleted"):
        find_garbage(full.ledger, 1, GRACE_SECONDS)
    assert any(full.refs[lost].identity[:12] in problem for problem in verify(full.ledger).problems)


def test_a_training_in_the_making_keeps_all_that_it_is_made_from_its_start_too(house: HouseInMemory) -> None:
    start = house.commit(
        "start", "model", {"models": ["law expert", "code expert"], "fit": []}, role="average"
    )
    house.memory.now += 2 * GRACE_SECONDS
    training = house.origin("in the making", "model", house.training(["news"], ("start",)))
    house.ledger.save_training(training, 1, house.files("in the making"), {"how": {}})
    assert artifact_key(start.ref) not in find_garbage(house.ledger, 1, GRACE_SECONDS).manifests
    house.memory.now += 2 * GRACE_SECONDS
    assert artifact_key(start.ref) in find_garbage(house.ledger, 1, GRACE_SECONDS).manifests


def test_what_comes_while_a_collection_looks_keeps_what_it_needs(house: HouseInMemory) -> None:
    """A mixture is listed before scores are, so that it can be seen without the scores that it is made of."""
    house.memory.now += 2 * GRACE_SECONDS
    listed = house.memory.list

    def list_late(prefix: str) -> Any:
        entries = list(listed(prefix))
        if prefix == "artifacts/" and "late" not in house.refs:
            house.commit("late", "scores", {"model": ["average for code"], "tokens": ["code tokens"]})
            house.commit("mixed", "mixture", {"fit": ["fit for code"], "scores": ["late"]})
            entries += listed(artifact_key(house.refs["mixed"]))
        return iter(entries)

    house.memory.list = list_late  # type: ignore[method-assign]
    keys = find_garbage(house.ledger, 1, GRACE_SECONDS).manifests
    assert not {artifact_key(house.refs[name]) for name in ("late", "mixed", "average for code")} & {*keys}


# Lineage


def test_a_descendant_is_known_though_the_average_that_it_started_from_was_collected(
    house: HouseInMemory,
) -> None:
    house.memory.now += 2 * GRACE_SECONDS
    collect_all(house.memory)
    assert not house.is_there("average for news")
    law = house.expert("law", "seed")
    assert influence_of(house.ledger, house.remove("law"), law).descendants == ("news",)
    purge_law(house.memory)
    code = house.expert("code", "seed")
    assert influence_of(house.ledger, house.remove("code"), code).descendants == ("news",)


def test_a_damaged_record_of_a_purge_is_told(full: HouseInMemory) -> None:
    purge_law(full.memory)
    key = next(key for key in full.memory.objects if key.startswith("tombstones/purge/"))
    data, modified = full.memory.objects[key]
    full.memory.objects[key] = data.replace(b"law", b"lax"), modified
    assert any(key in problem for problem in verify(full.ledger).problems)


# What holds only what changed of its base


def add_delta(house: HouseInMemory, is_merged: bool) -> None:
    """An expert of sport that holds what changed of an average which the expert of law is part of."""
    house.read("sport")
    start = {"start": ("average for code",)}
    house.commit("sport expert", "model", house.training(["sport"]) | start, role="expert", trains="lora")
    if is_merged:
        house.merge(house.expert("sport", "law expert", "code expert"))


def test_a_delta_goes_with_its_base_and_keeps_it_alive(house: HouseInMemory) -> None:
    add_delta(house, is_merged=True)
    house.remove("law")
    assert not {artifact_key(house.refs["average for code"])} & {
        *find_garbage(house.ledger, 1, -1.0).manifests
    }
    house.remove("sport")
    purge(house.ledger, planned_purge(house.ledger, "law"))
    assert not house.is_there("sport expert")
    assert house.is_there("news expert")  # whole without the average that it started from
    assert house.is_there("sport text")
    with pytest.raises(UserError, match="was purged"):
        rollback(house.ledger, 3)
    assert verify(house.ledger).problems == ()


def test_a_purge_that_would_leave_the_forest_a_useless_expert_is_refused(house: HouseInMemory) -> None:
    add_delta(house, is_merged=True)
    before = dict(house.memory.objects)
    with pytest.raises(UserError, match="'law' cannot be purged") as refused:
        purge_domain(house.ledger, "law")
    assert "`btm forest remove sport`" in str(refused.value.remedy)
    assert house.memory.objects == before


def test_an_expert_that_is_merged_while_its_base_is_purged_is_not_deleted(
    house: HouseInMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.remove("law")
    begin = Tombstones.begin

    def merge_first(tombstones: Tombstones, record: PurgeRecord) -> None:
        monkeypatch.undo()
        without_threads(monkeypatch)
        add_delta(house, is_merged=True)
        begin(tombstones, record)

    monkeypatch.setattr(Tombstones, "begin", merge_first)
    with pytest.raises(UserError, match="'law' cannot be purged") as refused:
        purge_domain(house.ledger, "law")
    assert "`btm forest remove sport`" in str(refused.value.remedy)
    assert all(map(house.is_there, ("sport expert", "average for code", "law expert")))
    house.remove("sport")
    purge_domain(house.ledger, "law")
    assert not house.is_there("sport expert")
    assert verify(house.ledger).problems == ()


def test_a_delta_is_of_no_use_without_its_base_and_says_so(house: HouseInMemory) -> None:
    add_delta(house, is_merged=False)
    key = artifact_key(house.refs["sport expert"])
    manifest = house.memory.objects[key]
    house.remove("law")
    purge(house.ledger, plan_purge(house.ledger, "law"))
    house.memory.objects[key] = manifest  # from a backup
    with pytest.raises(MissingError) as refused:
        base_of(house.ledger, house.ledger.get(house.refs["sport expert"]))
    assert refused.value.found == "the base was purged"
    assert any("was purged" in problem for problem in verify(house.ledger).problems)
