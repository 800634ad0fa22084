"""Expanding a forest by what has arrived: tiny real models in one process, a forest founded once."""

import gzip
import os
import random
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from btm_cluster.algorithm import grow, merge, settled_branches, train
from btm_cluster.commands.expand import show_expanded, show_new
from btm_cluster.data.sources import read_documents
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Failure, Outcome
from btm_cluster.errors import FoundationError, TextError, UserError
from btm_cluster.expansion import acceptance
from btm_cluster.expansion.arrivals import prepare_new
from btm_cluster.expansion.inbox import look
from btm_cluster.forest import Expert, Forest, Foundation
from btm_cluster.language_model.sampling import Sampling
from btm_cluster.ledger import Ledger
from btm_cluster.operations.averages import Average
from btm_cluster.operations.contributions import contributions
from btm_cluster.operations.evaluate import evaluate_forest
from btm_cluster.operations.expand import Expanded, expand, find_new
from btm_cluster.operations.generate import Continuation, generate
from btm_cluster.operations.merge import write_merged_model
from btm_cluster.operations.verify import verify
from btm_cluster.plan import ExpansionPlan, Plan
from btm_cluster.plan.expansion import AcceptancePlan
from btm_cluster.requests import StepRequest, TrainRequest
from btm_cluster.session import dry_ledger
from btm_cluster.storage import Entry
from btm_cluster.storage.local_folder import LocalFolder
from btm_cluster.workers.in_process import InProcess, LocalControl
from tests.chatting import TURN_BY_TURN, write_conversations
from tests.conftest import in_process, made_up_documents, write_jsonl
from tests.living import deliver, put


@pytest.fixture
def plan(founded_plan: Plan, tmp_path: Path) -> Plan:
    """The same, with a store of the test's own."""
    shutil.copytree(founded_plan.store, tmp_path / "store")
    return founded_plan.model_copy(update={"store": str(tmp_path / "store")})


@pytest.fixture
def ledger(plan: Plan) -> Ledger:
    return Ledger.open(plan.store)


@pytest.fixture
def arrive(ledger: Ledger, tmp_path: Path) -> Callable[..., None]:
    """Delivers a domain."""
    return lambda name, *documents, **how: deliver(ledger, tmp_path, name, *documents, **how)


def expanded(plan: Plan) -> Expanded:
    return expand(plan, in_process(plan))


def changed(plan: Plan, **sections: Any) -> Plan:
    """The plan with other sections."""
    return Plan.model_validate(plan.model_dump(mode="json") | sections)


def newest(ledger: Ledger) -> Forest:
    forest = ledger.log.newest()
    assert forest is not None
    return forest


def models(ledger: Ledger) -> dict[str, str]:
    """Manifest hashes of all models, by identity."""
    return {model.identity: model.manifest_hash for model in ledger.list_artifacts("model")}


def test_a_domain_in_the_inbox_becomes_an_expert_and_nothing_that_exists_is_made_again(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    before, old_models = newest(ledger), models(ledger)
    arrive("meadow")
    first = expanded(plan)
    assert first.added == ("meadow",)
    assert first.forest.version == before.version + 1
    assert [e for e in first.forest.experts if e.domain != "meadow"] == list(before.experts)
    assert models(ledger).items() >= old_models.items()
    gain = first.gains["meadow"]
    assert gain.before is not None
    assert gain.after < gain.before
    # Its text, its blocks, the average that it starts from and itself; a score of each of three experts on
    # its text.
    assert first.made == {"source": 1, "tokens": 3, "model": 2, "scores": 3, "fit": 1}
    assert {parent.identity for parent in first.forest.expert("meadow").parents} <= {
        e.identity for e in before.experts
    }
    again = expanded(plan)
    assert (again.forest, again.added, dict(again.made)) == (first.forest, (), {})
    evaluated = evaluate_forest(plan, in_process(plan))
    assert "meadow" in evaluated.verdict.rows["test"][0].cells, "though the plan does not name it"
    assert len(contributions(ledger).texts) == 4


def test_a_dry_run_says_what_would_be_added_and_writes_nothing(
    plan: Plan,
    ledger: Ledger,
    arrive: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrive("meadow")
    put(ledger, tmp_path, "island/island.pdf", b"refused")
    put(ledger, tmp_path, "island/READY", b"")
    before = sorted(Path(plan.store).rglob("*"))
    show_new(find_new(plan, dry_ledger(plan.store)), json_output=False)
    told = capsys.readouterr().out
    assert "would add: meadow, from the inbox\n" in told
    assert "quarantined: island: " in told
    assert told.endswith(f"1 would be read and added to forest version {newest(ledger).version}\n")
    assert sorted(Path(plan.store).rglob("*")) == before


def test_an_expansion_of_a_domain_that_the_plan_names_is_the_same_expert_as_in_a_run(
    plan: Plan, founded_plan: Plan, tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "meadow.jsonl", made_up_documents("meadow", 120))
    domains = [*plan.model_dump(mode="json")["domains"], {"name": "meadow", "text": str(text)}]
    by_expansion = expanded(changed(plan, domains=domains)).forest
    shutil.copytree(founded_plan.store, tmp_path / "other")
    by_run = grow(
        other := changed(plan, domains=domains, store=str(tmp_path / "other")), in_process(other)
    ).forest
    assert by_expansion.experts == by_run.experts


def test_the_founding_domains_texts_may_be_gone_and_the_plan_may_not_name_them_again(
    plan: Plan, arrive: Callable[..., None], tmp_path: Path
) -> None:
    arrive("meadow")
    gone = [{"name": "kitchen", "text": str(tmp_path / "moved away.jsonl")}]
    assert expanded(changed(plan, domains=gone)).added == ("meadow",)


def test_a_store_without_a_forest_and_a_plan_of_another_forest_are_refused_before_anything_is_read(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no forest in"):
        expanded(changed(plan, store=str(tmp_path / "empty")))
    arrive("meadow")
    with pytest.raises(FoundationError, match=r"training\.learning_rate: 0\.01 → 0\.1\n"):
        expanded(changed(plan, training=plan.training.model_dump() | {"learning_rate": 0.1}))
    assert not list(ledger.storage.list("expansions/"))


def test_a_half_arrived_domain_and_one_that_is_written_to_again_are_left_alone(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    arrive("meadow", ready=False)
    arrive("island")
    later = Path(plan.store, "inbox/island/READY").stat().st_mtime + 5
    os.utime(Path(plan.store, "inbox/island/a.jsonl"), (later, later))
    found = expanded(plan)
    assert found.added == ()
    assert found.waiting == {
        "meadow": "no READY yet",
        "island": "a.jsonl is newer than READY, which is written last",
    }
    arrive("meadow")
    assert expanded(plan).added == ("meadow",)
    assert not list(ledger.storage.list("quarantine/"))


def test_a_started_expansion_goes_on_from_where_it_was_settled_though_the_log_moved_on(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    base = newest(ledger)
    arrive("meadow")
    interrupted = in_process(plan)
    bare = plan.model_copy(update={"domains": (), "targets": ()})
    inbox = look(ledger, bare, base.domains)
    prepared = prepare_new(bare, inbox.arrivals, base, interrupted).prepared
    (settled,) = settled_branches(prepared, base, prepared.domains, {}, interrupted)
    arrive("island")
    # As if one had come in between.
    moved = expand(changed(plan, branching={"start": "seed"}), in_process(plan))
    assert moved.added == ("island", "meadow")
    assert moved.forest.expert("meadow").identity == settled.ref.identity
    assert {parent.identity for parent in moved.forest.expert("island").parents} == {base.foundation.seed}


def test_two_expansions_at_once_both_end_up_in_the_forest(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    base = newest(ledger)
    arrive("meadow")
    bare = plan.model_copy(update={"domains": (), "targets": ()})
    slow = in_process(plan)
    prepared = prepare_new(bare, look(ledger, bare, base.domains).arrivals, base, slow).prepared
    experts, _ = train(settled_branches(prepared, base, prepared.domains, {}, slow), slow)
    arrive("island")
    fast = expanded(plan)
    assert fast.added == ("island", "meadow")
    assert merge(base, experts, slow.ledger) == fast.forest
    assert fast.forest.expert("meadow") == experts[0]
    trained = [m for m in ledger.list_artifacts("model") if m.facts.get("role") == "expert"]
    assert len(trained) == 4


def test_bad_domains_are_quarantined_with_their_reasons_and_do_not_stop_the_others(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None], tmp_path: Path
) -> None:
    arrive("meadow")
    arrive("Bad Name")
    arrive("market")
    arrive("twin", made_up_documents("meadow", 120))
    arrive("short", ["one word", "two words"])
    for name, file, data in (
        ("archive", "a.tar.gz", b"x"),
        ("columns", "a.parquet", b"x"),
        ("broken", "a.jsonl", b'{"text": "cut'),
        ("binary", "a.txt", b"\0\1\2"),
        ("corrupt", "a.jsonl.gz", b"no gzip at all"),
        ("bomb", "a.txt.gz", gzip.compress(b"word " * 4_000_000)),
        ("odd-file", "[a]*.jsonl", b"{}"),
        ("empty", ".hidden", b"x"),
    ):
        put(ledger, tmp_path, f"{name}/{file}", data)
        put(ledger, tmp_path, f"{name}/READY", b"")
    bounded = changed(plan, expansion={"inbox": {"most_decompressed_gigabytes": 0.01}})
    found = expanded(bounded)
    assert found.added == ("meadow",)
    reasons = {
        "Bad Name": "a name that no domain can have",
        "market": "the plan has a text of this name",
        "twin": "the same documents as 'meadow'",
        "short": "has no document for",
        "archive": r"a \.tar file",
        "columns": r"a \.parquet file",
        "broken": "a line that is not JSON",
        "binary": "a binary file",
        "corrupt": "cannot read the text",
        "bomb": "more than 10,000,000 bytes, decompressed",
        "odd-file": "is no name for a file",
        "empty": "no text files",
    }
    assert found.quarantined.keys() == reasons.keys()
    for name, reason in reasons.items():
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(found.quarantined[name])
    driver = in_process(bounded)
    again = expand(bounded, driver)
    assert again.quarantined == found.quarantined
    assert not driver.made, "what is quarantined is not read again"
    put(ledger, tmp_path, "market/READY", b"")
    put(ledger, tmp_path, "broken/a.jsonl", Path(plan.store, "inbox/meadow/a.jsonl").read_bytes())
    assert "broken" in expanded(bounded).waiting
    arrive("broken", made_up_documents("mended", 120))
    assert expanded(bounded).added == ("broken",)


def test_what_editors_browsers_and_consoles_leave_in_the_store_stops_no_schedule_and_refuses_no_domain(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    arrive("meadow")
    store = Path(plan.store)
    left = [".DS_Store", ".nfs0000001", "a.jsonl~", "#a.jsonl#", ".a.jsonl.swp", ".git/config"]
    folders = [
        "inbox",
        "inbox/meadow",
        "inbox/meadow/deeper",
        "forest",
        "quarantine",
        "expansions",
        "held",
        "tombstones",
    ]
    for folder in folders:
        for name in left:
            (store / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (store / folder / name).write_bytes(b"\0 no text")
    (store / "inbox/meadow/.#a.jsonl").symlink_to("somebody@somewhere.1234")
    (store / "inbox/.lock").symlink_to("nowhere")
    (store / "inbox/a.jsonl").write_text("no folder of its own")
    found = expanded(plan)
    assert (found.added, found.quarantined, found.waiting) == (("meadow",), {}, {})
    told = [record.getMessage() for record in caplog.records if "none of the store's" in record.getMessage()]
    assert sum("in inbox/" in line for line in told) == 1
    caplog.clear()
    again = expanded(plan)
    assert (again.added, again.quarantined) == ((), {})
    assert not [record for record in caplog.records if "none of the store's" in record.getMessage()], (
        "told once"
    )
    assert verify(ledger).problems == ()


def test_folder_markers_of_object_storage_belong_to_no_domain(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    class WithMarkers(LocalFolder):
        """As an S3 console makes folders: an object of no bytes whose key ends in a slash."""

        def list(self, prefix: str) -> Iterator[Entry]:
            yield from super().list(prefix)
            yield from (Entry(key, 0, 1e12) for key in ("inbox/", "inbox/meadow/", "inbox/meadow/deeper/"))

    arrive("meadow")
    bare = plan.model_copy(update={"domains": (), "targets": ()})
    found = look(Ledger(WithMarkers(plan.store)), bare, ())
    assert [arrival.domain.name for arrival in found.arrivals] == ["meadow"]
    assert found == look(ledger, bare, ())


def test_old_refusals_are_not_read_again_unless_what_was_refused_still_lies_there(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    # 5,000 of them took 4.6 s of every expansion.
    arrive("Bad Name")
    first = expanded(plan).quarantined
    assert first.keys() == {"Bad Name"}
    for number in range(20):
        Path(ledger.storage.address(f"quarantine/{number:064x}.json")).write_bytes(b"not even read")
    assert expanded(plan).quarantined == first


def test_links_and_pipes_are_refused_and_what_they_lead_to_is_not_read(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None], tmp_path: Path
) -> None:
    secret = write_jsonl(tmp_path / "secret" / "a.jsonl", made_up_documents("secret", 120))
    inbox = Path(plan.store, "inbox")
    for name in ("linked", "piped", "deep"):
        arrive(name)
    (inbox / "linked" / "b.jsonl").symlink_to(secret)
    os.mkfifo(inbox / "piped" / "b.jsonl")
    (inbox / "deep" / "folder").symlink_to(secret.parent)
    (inbox / "whole").symlink_to(secret.parent)
    found = expanded(plan)
    assert found.added == ()
    assert found.quarantined == {
        "linked": "b.jsonl is a link, or no file",
        "piped": "b.jsonl is a link, or no file",
        "deep": "folder is a link, or no file",
        "whole": "the folder is a link, or no file",
    }
    assert len(list(ledger.list_artifacts("source"))) == 3


def test_a_hard_link_is_refused_since_it_may_be_somebody_elses_file(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None], tmp_path: Path
) -> None:
    secret = write_jsonl(tmp_path / "secret.jsonl", made_up_documents("secret", 120))
    arrive("linked")
    arrive("swapped")
    inbox = Path(plan.store, "inbox")
    os.link(secret, inbox / "linked" / "b.jsonl")
    found = look(ledger, plan, ())
    assert found.quarantined == {
        "linked": "b.jsonl is a hard link, so it may be somebody else's file: deliver a copy"
    }
    (arrival,) = found.arrivals
    (inbox / "swapped" / "a.jsonl").unlink()
    os.link(secret, inbox / "swapped" / "a.jsonl")  # after the look
    with pytest.raises(TextError, match="is a link"):
        list(read_documents(arrival.domain, plan.reading, 10**9))


def test_a_document_that_is_appended_while_its_domain_is_read_is_noticed(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    arrive("island")
    base, driver = newest(ledger), in_process(plan)
    bare = plan.model_copy(update={"domains": (), "targets": ()})
    inbox = look(ledger, bare, base.domains)
    with Path(plan.store, "inbox/meadow/a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    new = prepare_new(bare, inbox.arrivals, base, driver)
    assert [domain.name for domain in new.prepared.domains] == ["island"]
    assert [(failure.label, failure.cause) for failure in new.failures] == [
        ("meadow", "its files changed while they were read")
    ]
    assert not list(ledger.storage.list("quarantine/"))
    arrive("meadow", made_up_documents("meadow", 121))
    assert expanded(plan).added == ("island", "meadow")


def test_what_is_wrong_with_a_domain_is_found_by_reading_it_twice_and_its_reason_says_what_to_do(
    plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    """Once more than it takes, since a store that was out for a moment looks the same."""
    for name in ("broken", "cut"):
        put(ledger, tmp_path, f"{name}/a.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-1])
        put(ledger, tmp_path, f"{name}/READY", b"")
    read: list[str] = []
    control = LocalControl(lambda progress: read.append(progress.label), threading.Event())
    found = expand(plan, Driver(ledger, InProcess(ledger, control)))
    assert "expected: a whole file" in found.quarantined["broken"]
    assert "mend or replace the file" in found.quarantined["broken"]
    assert (read.count("broken"), read.count("cut")) == (2, 2)


def test_a_setting_of_the_inbox_is_for_the_deliveries_that_it_can_apply_to(
    plan: Plan, ledger: Ledger, tmp_path: Path
) -> None:
    rows = "".join(f"{i},{text}\n" for i, text in enumerate(made_up_documents("columns", 120)))
    plain = "\n--\n".join(made_up_documents("plain", 120))
    for name, file, data in (("columns", "a.csv", "id,body\n" + rows), ("plain", "a.txt", plain)):
        put(ledger, tmp_path, f"{name}/{file}", data.encode())
        put(ledger, tmp_path, f"{name}/READY", b"")
    both = changed(plan, expansion={"inbox": {"field": "body", "delimiter": "\n--\n"}})
    assert expanded(both).added == ("columns", "plain")


def test_chats_arrive_beside_plain_text(plan: Plan, ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(TURN_BY_TURN)
    chats = write_conversations(tmp_path / "a.jsonl", "meadow", 60).read_bytes()
    plain = "\n--\n".join(made_up_documents("plain", 120)).encode()
    for name, file, data in (("chats", "a.jsonl", chats), ("plain", "a.txt", plain)):
        put(ledger, tmp_path, f"{name}/{file}", data)
        put(ledger, tmp_path, f"{name}/READY", b"")
    inbox = {"messages": "messages", "delimiter": "\n--\n"}
    reading = plan.reading.model_dump() | {"chat_template": str(tmp_path / "own.jinja")}
    assert expanded(changed(plan, expansion={"inbox": inbox}, reading=reading)).added == ("chats", "plain")


def test_files_and_sizes_beyond_the_plans_bounds_are_refused_before_a_byte_is_read(
    plan: Plan, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    small = expanded(changed(plan, expansion={"inbox": {"most_gigabytes": 1e-6}}))
    assert "the plan takes 1e-06 GB" in small.quarantined["meadow"]
    assert not small.made


def test_of_more_domains_than_the_plan_takes_at_once_the_rest_wait(
    plan: Plan, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    arrive("island")
    few = changed(plan, expansion={"inbox": {"most_domains": 1}})
    first = expanded(few)
    assert (first.added, first.waiting) == (("island",), {"meadow": "the plan takes 1 at once"})
    assert expanded(few).added == ("meadow",)


def test_names_in_the_inbox_cannot_write_to_a_terminal(
    plan: Plan, arrive: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    arrive("a\x1b[2Jb")
    arrive("no-utf-8")
    os.rename(Path(plan.store, "inbox/no-utf-8"), os.fsencode(Path(plan.store, "inbox")) + b"/no-utf-\xff")
    show_expanded(expanded(plan), json_output=False)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "quarantined: a?[2Jb: a name that no domain can have" in shown
    assert "quarantined: no-utf-?: a name that no domain can have" in shown


def test_an_expert_whose_inbox_files_were_replaced_stays_and_the_expansion_says_so(
    plan: Plan, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    first = expanded(plan)
    assert first.passed_over == {}
    arrive("meadow", made_up_documents("another meadow", 90))
    later = expanded(plan)
    assert later.forest == first.forest
    assert "no longer those its expert was trained on" in later.passed_over["meadow"]


def test_new_text_delivered_by_a_name_that_the_forest_already_has_is_not_passed_over_in_silence(
    plan: Plan, arrive: Callable[..., None]
) -> None:
    """A founding domain has no recorded delivery: its files were compared with nothing, and nothing was said."""
    arrive("meadow")
    first = expanded(plan)
    arrive("kitchen")
    later = expanded(plan)
    assert later.forest == first.forest
    assert "give new text a new name" in later.passed_over["kitchen"]
    assert "meadow" not in later.passed_over, "its expert came from the inbox"


def test_what_arrived_is_a_text_to_merge_and_to_generate_for(
    plan: Plan, arrive: Callable[..., None], tmp_path: Path
) -> None:
    arrive("meadow")
    assert expanded(plan).added == ("meadow",)
    merged = write_merged_model(plan, Average("argmax", "meadow"), tmp_path / "merged", in_process(plan))
    assert merged.weights == {"meadow": 1.0}
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert generate(plan, "meadow", ["a"], Continuation(2, Sampling()), in_process(plan))[0].tokens
    with pytest.raises(UserError, match="no such text in the plan or the forest"):
        write_merged_model(plan, Average("argmax", "prairie"), tmp_path / "none", in_process(plan))


def test_a_batch_that_is_too_bad_is_taken_apart_in_the_order_of_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    founding, *new = (Expert(name, f"model-{name}", "", f"text-{name}", ()) for name in "fcab")
    forest = Forest(0, Foundation("seed", "tokenizer", "model", 8, ()), (founding,), {}, "")
    limit = AcceptancePlan(development_perplexity_rise_at_most=0.05)
    prepared = SimpleNamespace(
        plan=SimpleNamespace(expansion=ExpansionPlan(accept_if=limit)), domains=(), texts=()
    )
    monkeypatch.setattr(acceptance, "_texts_of", lambda *_: [SimpleNamespace(name="known")])
    # Each further expert costs 3 %, so that there is room for one of three.
    monkeypatch.setattr(
        acceptance, "_ensemble_perplexity", lambda *_: lambda chosen, _: 100 * 1.03 ** len(chosen)
    )
    found = acceptance.judge(prepared, forest, new, None)  # type: ignore[arg-type]
    assert [expert.domain for expert in found.accepted] == ["a"]
    assert set(found.held) == {"b", "c"}


def test_an_expansion_that_makes_the_forest_worse_is_held_back_until_the_plan_allows_it(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    # With a uniform prior a further expert takes its share of the first tokens, and this one knows nothing of
    # words.
    digits = random.Random(0)
    arrive("meadow", [" ".join(f"{digits.randrange(10**9)}" for _ in range(40)) for _ in range(120)])
    strict = changed(
        plan,
        merging={"posterior": "full", "prior": "uniform"},
        expansion={"accept_if": {"development_perplexity_rise_at_most": 0.0}},
    )
    before = newest(ledger)
    found = expanded(strict)
    assert found.forest == before
    assert set(found.held) == {"meadow"}
    assert "the plan allows +0.00%" in found.held["meadow"]
    driver = in_process(strict)
    again = expand(strict, driver)
    assert (again.forest, again.held) == (before, found.held)
    assert not driver.made
    loose = changed(strict, expansion={"accept_if": {"development_perplexity_rise_at_most": 0.5}})
    driver = in_process(loose)
    taken = expand(loose, driver)
    assert taken.added == ("meadow",)
    assert not driver.made, "what was trained and scored while it was held back is used"


def test_an_expert_is_not_accepted_for_what_it_learned_by_heart_of_a_target(
    plan: Plan, arrive: Callable[..., None]
) -> None:
    # It makes the forest worse on both founding domains, and much better on the target whose documents it was
    # trained on.
    digits = random.Random(0)
    numbers = [" ".join(f"{digits.randrange(10**9)}" for _ in range(40)) for _ in range(60)]
    arrive("meadow", [*numbers, *made_up_documents("market", 40)])
    strict = changed(
        plan,
        merging={"posterior": "full", "prior": "uniform"},
        expansion={"accept_if": {"development_perplexity_rise_at_most": 0.0}},
    )
    assert set(expanded(strict).held) == {"meadow"}


class FailsIsland(InProcess):
    """Workers that cannot train one domain."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        lost = [one for one in requests if isinstance(one, TrainRequest) and one.label == "island"]
        yield from ((request, Failure("island", 4, "on a host", "its process died")) for request in lost)
        yield from super().run([request for request in requests if request not in lost])


def test_one_expert_that_fails_does_not_stop_the_others_and_only_it_is_tried_again(
    plan: Plan, ledger: Ledger, arrive: Callable[..., None]
) -> None:
    arrive("meadow")
    arrive("island")
    control = LocalControl(lambda _: None, threading.Event())
    found = expand(plan, Driver(ledger, FailsIsland(ledger, control)))
    assert found.added == ("meadow",)
    assert [failure.label for failure in found.failures] == ["island"]
    again = expanded(plan)
    assert again.added == ("island",)
    assert not {parent.identity for parent in again.forest.expert("island").parents} & {
        again.forest.expert("meadow").identity
    }, "it starts from the forest of the first try"
    assert dict(again.made) == {"model": 1, "scores": 2}
