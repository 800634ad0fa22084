"""Taking a domain out of a forest, bringing it back, rolling back, and purging
it without a trace but its tombstones."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from btm_cluster.cli import app, run_command
from btm_cluster.curve import CURVE_FILE
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.recipes import demix_request
from btm_cluster.equations import learned_gate
from btm_cluster.errors import UserError
from btm_cluster.evaluation.comparison import Comparer
from btm_cluster.evaluation.evaluate import forest_ensemble
from btm_cluster.evaluation.fitting import average_request, fit_requests, mix_request, weight_requests
from btm_cluster.evaluation.scoring import score_requests
from btm_cluster.evaluation.systems import CALIBRATED, GATE, Ensemble
from btm_cluster.forest import Forest, difference
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.purge import plan_purge, purge
from btm_cluster.ledger.records import list_branch_points
from btm_cluster.ledger.versions import last_expert
from btm_cluster.operations.expand import expand
from btm_cluster.operations.gc import collect, find_garbage
from btm_cluster.operations.remove import bring_back, influence_of, remove
from btm_cluster.operations.rollback import rollback
from btm_cluster.operations.run import run_plan
from btm_cluster.operations.verify import verify
from btm_cluster.plan import Plan
from btm_cluster.requests import ShuffleTexts
from tests.conftest import in_process, made_up_documents, write_jsonl
from tests.living import deliver

DAY = 86_400.0


@pytest.fixture(scope="module")
def lived(founded_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Version 2: meadow, from the inbox, branched from the two founding domains.

    Version 3: island, from all three.
    """
    folder = tmp_path_factory.mktemp("lived")
    shutil.copytree(founded_plan.store, folder / "store")
    plan = founded_plan.model_copy(
        update={"store": str(folder / "store"), "branching": uniform(founded_plan)}
    )
    ledger = Ledger.open(plan.store)
    for name in ("meadow", "island"):
        deliver(ledger, folder, name)
        assert expand(plan, in_process(plan)).added == (name,)
    return plan


def uniform(plan: Plan) -> object:
    return plan.branching.model_copy(update={"start": "uniform"})


@pytest.fixture
def plan(lived: Plan, tmp_path: Path) -> Plan:
    """The same, with a store of the test's own."""
    shutil.copytree(lived.store, tmp_path / "store")
    return lived.model_copy(update={"store": str(tmp_path / "store")})


@pytest.fixture
def ledger(plan: Plan) -> Ledger:
    return Ledger.open(plan.store)


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return run_command(lambda: app(list(arguments))), *capsys.readouterr()

    return call


def newest(ledger: Ledger) -> Forest:
    forest = ledger.log.newest()
    assert forest is not None
    return forest


def let_all_be_old(plan: Plan) -> None:
    for path in Path(plan.store).rglob("*"):
        os.utime(path, (time.time() - 100 * DAY,) * 2)


def named_in(store: str, trace: str) -> set[str]:
    """The objects of a store whose name or bytes hold a trace, but for the log
    of its forest and its tombstones."""
    keys = {path.relative_to(store).as_posix(): path for path in Path(store).rglob("*") if path.is_file()}
    return {
        key
        for key, path in keys.items()
        if not key.startswith(("forest/", "tombstones/"))
        and (trace in key or trace.encode() in path.read_bytes())
    }


TAKEN_OUT = (
    "it was taken out of the forest; unless it was purged, `btm forest remove meadow --undo` brings it back; give "
    "new text a new name"
)


def test_a_removed_domain_is_out_of_the_forest_at_once_and_no_schedule_brings_it_back(
    plan: Plan, ledger: Ledger
) -> None:
    before = newest(ledger)
    after = remove(ledger, "meadow")
    assert after.version == before.version + 1
    assert after.domains == ("harbour", "island", "kitchen")
    assert set(after.manifests) == set(before.manifests) - {before.expert("meadow").identity}
    found = expand(plan, in_process(plan))
    assert (found.forest, found.passed_over) == (after, {"meadow": TAKEN_OUT})
    back = bring_back(ledger, "meadow")
    assert (back.experts, back.withdrawn) == (before.experts, ())
    assert expand(plan, in_process(plan)).passed_over == {}
    remove(ledger, "kitchen")
    assert expand(plan, in_process(plan)).passed_over.keys() == {"kitchen"}, (
        "a domain of the plan is named too"
    )
    bring_back(ledger, "kitchen")


def test_a_founding_domain_that_was_removed_is_passed_over_by_a_run_of_its_plan(
    plan: Plan, ledger: Ledger
) -> None:
    after = remove(ledger, "kitchen")
    run = run_plan(plan, in_process(plan))
    assert run.forest == after
    assert run.passed_over == ("kitchen",)
    assert "kitchen" not in {text.name for text in run.texts}
    remove(ledger, "harbour")
    with pytest.raises(UserError, match="every domain of the plan was taken out"):
        run_plan(plan, in_process(plan))


def test_removing_what_is_not_there_and_bringing_back_what_was_not_removed_are_refused(
    ledger: Ledger,
) -> None:
    with pytest.raises(UserError, match="no domain 'desert'"):
        remove(ledger, "desert")
    with pytest.raises(UserError, match="was not taken out"):
        bring_back(ledger, "meadow")
    assert newest(ledger).version == 3


def test_what_still_carries_a_removed_domain_is_told_from_lineage(ledger: Ledger) -> None:
    forest = newest(ledger)
    of_meadow = influence_of(ledger, remove(ledger, "meadow"), forest.expert("meadow"))
    assert (of_meadow.seed, of_meadow.tokenizer, of_meadow.baselines) == (None, None, ())
    assert of_meadow.descendants == ("island",)
    assert len(of_meadow.merged) == 1
    of_kitchen = influence_of(ledger, remove(ledger, "kitchen"), forest.expert("kitchen"))
    assert of_kitchen.seed == forest.foundation.seed
    assert of_kitchen.tokenizer == forest.foundation.tokenizer
    assert len(of_kitchen.baselines) == 3, "the Transformer-LM, and its two milestones"
    # Through meadow, which is out of the forest by now, too.
    assert of_kitchen.descendants == ("island",)
    carriers = {forest.expert(domain).identity for domain in ("kitchen", "meadow", "island")}
    averages = [m for m in ledger.list_artifacts("model") if m.facts["role"] == "average"]
    assert set(of_kitchen.merged) == {m.identity for m in averages if carriers & set(m.parents)}


def test_a_rollback_is_a_new_version_equal_to_an_old_one_and_what_came_since_stays_out(
    plan: Plan, ledger: Ledger
) -> None:
    old = ledger.log.version(2)
    assert old is not None
    back = rollback(ledger, 2)
    assert (back.version, back.experts, back.manifests) == (4, old.experts, old.manifests)
    assert back.withdrawn == ("island",)
    assert back.parent == ledger.log.version_hash(3)
    assert expand(plan, in_process(plan)).forest == back
    assert difference(newest(ledger), rollback(ledger, 3)).added == ("island",)
    with pytest.raises(UserError, match="no forest version 9"):
        rollback(ledger, 9)
    assert verify(ledger).problems == ()


def test_a_purged_domain_leaves_nothing_but_tombstones_and_the_store_stays_sound(
    plan: Plan, ledger: Ledger
) -> None:
    forest = newest(ledger)
    expert = forest.expert("meadow")
    document = json.loads(Path(plan.store, "inbox/meadow/a.jsonl").read_text().splitlines()[0])["text"]
    assert named_in(plan.store, document) == {"inbox/meadow/a.jsonl"}
    blobs = ledger.get(Ref("model", expert.identity)).blobs
    own = {expert.weights_sha256, *(blob.sha256 for blob in blobs if blob.name == CURVE_FILE)}
    shared = {blob.sha256 for blob in blobs} - own
    assert shared, "its configuration and tokenizer are everybody's"
    remove(ledger, "meadow")
    purge(ledger, plan_purge(ledger, "meadow"))
    for trace in (document, expert.text, expert.weights_sha256, "meadow"):
        assert not named_in(plan.store, trace)
    assert own.isdisjoint(path.name for path in Path(plan.store, "blobs").iterdir())
    # Its descendant's lineage is an identity that leads to a tombstone: that of the average it started from.
    (start,) = [point.start.model for point in list_branch_points(ledger) if point.domain == "island"]
    assert expert.identity in ledger.tombstones.all()[start].body["parents"]
    assert named_in(plan.store, expert.identity) == set()
    assert ledger.find(Ref("model", forest.expert("island").identity)) is not None
    assert {path.name for path in Path(plan.store, "blobs").iterdir()} >= shared
    assert not Path(plan.store, "inbox/meadow").exists()
    assert ledger.tombstones.find(Ref("text", expert.text))
    assert ledger.tombstones.find(Ref("model", expert.identity))
    assert verify(ledger).problems == ()
    # A descendant still knows its seed, though its parent is gone, and the forest is evaluated as ever.
    again = run_plan(plan, in_process(plan))
    assert again.forest.domains == ("harbour", "island", "kitchen")
    let_all_be_old(plan)
    collect(ledger, find_garbage(ledger, 10, DAY))
    assert verify(ledger).problems == ()
    assert ledger.tombstones.find(Ref("text", expert.text))


def test_a_target_that_went_by_the_name_is_purged_too(plan: Plan, ledger: Ledger, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "earlier.jsonl", made_up_documents("meadow as it was", 40))
    (market,) = plan.targets
    earlier = market.model_copy(update={"name": "meadow", "text": (str(file),)})
    with_it = plan.model_copy(update={"targets": (earlier,)})
    with pytest.raises(UserError, match="the target 'meadow' has the name of a domain"):
        prepare(with_it, in_process(with_it))  # read, all the same
    assert len([a for a in ledger.list_artifacts("source") if a.note["name"] == "meadow"]) == 2
    remove(ledger, "meadow")
    purge(ledger, plan_purge(ledger, "meadow"))
    assert not [a for a in ledger.list_artifacts("source") if a.note["name"] == "meadow"]
    assert verify(ledger).problems == ()


def test_a_studys_random_splits_that_hold_its_documents_are_purged_too(plan: Plan, ledger: Ledger) -> None:
    texts = {expert.domain: expert.text for expert in newest(ledger).experts}
    pairs = {"with": ("meadow", "harbour"), "without": ("island", "harbour")}
    asked = {name: ShuffleTexts(name, tuple(texts[d] for d in pair), 0, 0) for name, pair in pairs.items()}
    made = dict(zip(asked, in_process(plan).require(list(asked.values())), strict=True))
    remove(ledger, "meadow")
    purge(ledger, plan_purge(ledger, "meadow"))
    for name, read in made.items():
        kept = ledger.find(read.parts[0]) is not None
        assert kept == (name == "without")
        assert (ledger.find(asked[name].ref) is not None) == kept
    assert verify(ledger).problems == ()


@pytest.mark.parametrize("way", ["purge", "collection"])
def test_what_is_mixed_goes_with_an_expert_that_took_part_in_it(
    plan: Plan, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(learned_gate, "LOOKS", 1)
    experts = {expert.domain: Ref("model", expert.identity) for expert in newest(ledger).experts}
    driver = in_process(plan)
    prepared = prepare(plan, driver)
    with_it, without = (
        Ensemble(
            "forest",
            tuple((domain, experts[domain]) for domain in pair),
            (CALIBRATED, GATE),
            ("fitted",),
            seed,
        )
        for pair, seed in (
            (("island", "harbour"), Ref("model", newest(ledger).foundation.seed)),
            (("kitchen", "harbour"), Ref("model", newest(ledger).foundation.seed)),
        )
    )
    Comparer(prepared, {}, [with_it, without]).compare(driver)

    def there(ensemble: Ensemble) -> set[bool]:
        made = [mix_request(prepared, ensemble, text, "test") for text in prepared.texts]
        made += [fit for text in prepared.texts for fit in fit_requests(prepared, ensemble, text)]
        return {ledger.find(request.ref) is not None for request in made}

    def averages(ensemble: Ensemble) -> set[bool]:
        made = [average_request(prepared, ensemble, "fitted", text) for text in prepared.texts]
        return {ledger.find(request.ref) is not None for request in made}

    assert there(with_it) == there(without) == averages(with_it) == averages(without) == {True}
    let_all_be_old(plan)
    collect(ledger, find_garbage(ledger, 10, DAY))
    assert there(with_it) == there(without) == {True}, "they go with the scores that they are made of"
    assert averages(with_it) == averages(without) == {False}
    remove(ledger, "island")
    if way == "collection":
        let_all_be_old(plan)
        collect(ledger, find_garbage(ledger, 1, DAY))
    else:
        purge(ledger, plan_purge(ledger, "island"))
    assert (there(with_it), there(without)) == ({False}, {True})
    assert verify(ledger).problems == ()


def test_an_average_whose_weights_were_fitted_on_a_purged_target_goes_too(plan: Plan, ledger: Ledger) -> None:
    """None of its experts goes, and its label names no domain."""
    driver = in_process(plan)
    prepared = prepare(plan, driver)
    experts = forest_ensemble(prepared, newest(ledger))
    market = next(text for text in prepared.texts if text.is_target)
    average = average_request(prepared, experts, "fitted", market)
    fits = weight_requests(prepared, experts, "fitted", market)
    driver.require([*score_requests(prepared, experts.names, [market], ["development"]), *fits, average])
    others = [
        m.ref for m in ledger.list_artifacts("model") if m.facts["role"] == "average" and m.ref != average.ref
    ]
    purge(ledger, plan_purge(ledger, "market"))
    assert ledger.find(average.ref) is None
    assert any(ledger.find(other) for other in others)
    assert all(ledger.find(expert) for expert in experts.refs)
    assert not named_in(plan.store, "market")
    assert verify(ledger).problems == ()


def test_what_was_purged_does_not_come_back_by_undo_rollback_inbox_or_plan(
    plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    remove(ledger, "meadow")
    purge(ledger, plan_purge(ledger, "meadow"))
    after = newest(ledger)
    for comes_back in (
        lambda: bring_back(ledger, "meadow"),
        lambda: rollback(ledger, 2),
        lambda: rollback(ledger, 3),
    ):
        with pytest.raises(UserError, match="was purged"):
            comes_back()
    assert rollback(ledger, 1).domains == ("harbour", "kitchen")
    rollback(ledger, after.version)
    deliver(ledger, tmp_path, "meadow")
    found = expand(plan, in_process(plan))
    assert found.passed_over == {"meadow": TAKEN_OUT}
    deliver(ledger, tmp_path, "another-name", made_up_documents("meadow", 120))
    found = expand(plan, in_process(plan))
    assert found.added == ()
    assert "was purged from the store" in found.quarantined["another-name"]
    assert not list(ledger.storage.list("artifacts/text/" + next(iter(plan_purge(ledger, "meadow").texts))))


def test_an_interrupted_purge_is_found_by_verify_and_goes_on_when_it_is_run_again(ledger: Ledger) -> None:
    text, expert = newest(ledger).expert("meadow").text, newest(ledger).expert("meadow")
    purge_plan = plan_purge(ledger, "meadow")
    remove(ledger, "meadow")
    body = {"domain": "meadow", "kind": "text", "identity": text, "parents": []}
    ledger.documents.create(f"tombstones/text/{text}.json", body)
    assert [problem for problem in verify(ledger).problems if "was purged, and is there again" in problem]
    again = plan_purge(ledger, "meadow")
    assert (again.manifests, again.blobs) == (purge_plan.manifests, purge_plan.blobs)
    purge(ledger, again)
    assert verify(ledger).problems == ()
    tombstone = ledger.tombstones.find(Ref("model", expert.identity))
    assert tombstone is not None
    assert tombstone.body["parents"] == [parent.identity for parent in expert.parents]


def test_a_purged_founding_domain_leaves_seed_and_tokenizer_and_the_forest_lives_on(
    plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    remove(ledger, "kitchen")
    purge(ledger, plan_purge(ledger, "kitchen"))
    assert verify(ledger).problems == ()
    deliver(ledger, tmp_path, "desert")
    assert expand(plan, in_process(plan)).added == ("desert",)
    assert run_plan(plan, in_process(plan)).forest.domains == ("desert", "harbour", "island", "meadow")
    assert named_in(plan.store, "fitted for desert"), "averages for it, by their cards and manifests"
    remove(ledger, "desert")
    purge(ledger, plan_purge(ledger, "desert"))
    assert not named_in(plan.store, "desert")
    assert verify(ledger).problems == ()


def test_of_a_demix_the_part_of_a_purged_domain_goes_and_the_rest_is_named(
    plan: Plan, ledger: Ledger
) -> None:
    driver = in_process(plan)
    prepared = prepare(plan, driver)
    demix = demix_request(prepared)
    driver.require([demix])
    remove(ledger, "kitchen")
    expert = last_expert(ledger, "kitchen")
    assert expert is not None
    assert demix.ref.identity in influence_of(ledger, newest(ledger), expert).baselines
    purge(ledger, plan_purge(ledger, "kitchen"))
    names = {text: name for name, text in prepared.founders}
    assert {names[part.text] for part in demix.parts if ledger.find(part.ref)} == {"harbour"}
    assert verify(ledger).problems == ()


def test_a_domain_that_was_never_merged_can_be_purged(plan: Plan, ledger: Ledger, tmp_path: Path) -> None:
    deliver(ledger, tmp_path, "desert", ["too", "short"])
    assert set(expand(plan, in_process(plan)).quarantined) == {"desert"}
    purge(ledger, plan_purge(ledger, "desert"))
    assert not [
        entry.key for folder in ("inbox/desert/", "quarantine/") for entry in ledger.storage.list(folder)
    ]
    with pytest.raises(UserError, match="has nothing of 'desert'"):
        plan_purge(ledger, "desert")
    with pytest.raises(UserError, match="is no domain"):
        plan_purge(ledger, "../forest")


def test_the_commands_say_what_goes_and_what_stays_and_purge_only_when_confirmed(
    plan: Plan, ledger: Ledger, btm: Callable[..., tuple[int, str, str]]
) -> None:
    at = ("--store", plan.store)
    code, out, err = btm("forest", "remove", "meadow", "--purge", *at)
    assert (code, newest(ledger).version) == (2, 3)
    assert "purging meadow deletes" in out
    assert "2 files of the inbox" in out
    assert "--yes" in err
    assert btm("forest", "remove", "meadow", "--purge", "--dry-run", *at)[:2] == (0, out)
    code, told, _ = btm("forest", "remove", "meadow", "--dry-run", *at)
    assert (code, newest(ledger).version) == (0, 3)
    assert told.startswith("it would be forest version 4: removed meadow\n")
    assert "the expert of island, which descends from its expert" in told
    told = json.loads(btm("forest", "remove", "meadow", "--purge", "--dry-run", "--json", *at)[1])
    assert told["would_purge"]["kinds"]["model"] > 0
    code, out, _ = btm("forest", "remove", "meadow", "--purge", "--yes", *at)
    assert code == 0
    assert "the expert of island, which descends from its expert" in out
    assert "purged meadow; the forest stands at version 4" in out
    code, out, _ = btm("forest", "diff", "3", "4", *at)
    assert (code, out) == (0, "- meadow\n")
    code, _, err = btm("forest", "rollback", "3", *at)
    assert code == 2
    assert "choose a version without 'meadow'" in err
    code, out, _ = btm("forest", "remove", "kitchen", *at)
    assert "since it was a founding domain, and so every expert" in out
    assert btm("forest", "remove", "kitchen", "--yes", *at)[0] == 2
    code, out, _ = btm("forest", "remove", "kitchen", "--undo", "--json", *at)
    assert (code, newest(ledger).domains) == (0, ("harbour", "island", "kitchen"))
    assert json.loads(out) == {"version": 6}
    assert "there is no forest version 9" in btm("forest", "show", "--version", "9", *at)[2]
    code, out, _ = btm("forest", "rollback", "1", *at)
    assert "forest version 7: rolled back to version 1, 2 experts" in out
    code, out, _ = btm("forest", "rollback", "1", "--json", *at)
    assert (code, json.loads(out)) == (
        0,
        {"version": 8, "reason": "rolled back to version 1", "domains": ["harbour", "kitchen"]},
    )
    code, out, _ = btm("forest", "pin", "8", "--json", *at)
    assert (code, json.loads(out)) == (0, {"pinned": [8]})
    log = json.loads(btm("forest", "log", *at, "--json")[1])
    assert [entry["reason"] for entry in log[1:3]] == ["rolled back to version 1", "brought back kitchen"]
