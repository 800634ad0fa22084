"""The page of a plan from its store alone: what is measured, against other routes, and that nothing is made."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from markupsafe import escape

from btm_cluster.cli import app, run_command
from btm_cluster.data.blocks import Blocks
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.preparation import prepare
from btm_cluster.driver.run_events import RunEvents
from btm_cluster.driver.run_log import RunLog
from btm_cluster.errors import UserError
from btm_cluster.evaluation.scoring import stack_of
from btm_cluster.evaluation.texts import report_texts
from btm_cluster.evaluation.verdict_table import table_of
from btm_cluster.ledger import Ledger, Ref
from btm_cluster.ledger.timelines import TIMELINE_FILE, run_key, write_timeline
from btm_cluster.mixing.fitting import FULL, Mixing
from btm_cluster.operations.plan import DONE
from btm_cluster.operations.report import finish_run, page_of
from btm_cluster.operations.run import run_plan
from btm_cluster.plan import Plan
from btm_cluster.report.measured import find_excerpt, longest_stretch, read_overlaps, read_text_parts
from btm_cluster.steps.stored import documents_of, open_tokenizer
from tests.conftest import in_process
from tests.integration.conftest import GrownForest, copy_store
from tests.made_report import made_timeline


@pytest.fixture(scope="module")
def parts(grown: GrownForest) -> dict[str, Any]:
    found = read_text_parts(grown.prepared, grown.grown.forest, grown.driver.ledger)
    return {one.name: one for one in found}


def test_what_experts_do_on_a_text_is_what_the_comparison_says(
    grown: GrownForest, parts: dict[str, Any]
) -> None:
    results = {one.text: one for one in grown.evaluation.results if one.split == "test"}
    assert list(parts) == list(results)
    for name, one in parts.items():
        sizes = float(results[name].sizes_UD[0].sum())

        def perplexity(system: str, name: str = name, sizes: float = sizes) -> float:
            return math.exp(-float(results[name].logp[system][0].sum()) / sizes)

        assert one.is_whole
        assert one.parts.perplexity == pytest.approx(perplexity("ensemble, calibrated"), rel=1e-9)
        assert one.seed == pytest.approx(perplexity("seed"), rel=1e-9)
        assert min(one.parts.alone) <= perplexity("best single expert") * (1 + 1e-9)
        assert sum(one.parts.weights) == pytest.approx(1)
        assert one.parts.of_top[-1] == pytest.approx(one.parts.perplexity, rel=1e-9), "all of them"
        assert one.parts.of_top[0] >= min(one.parts.alone) * (1 - 1e-9), "one of them"
    own = {name: parts[name].parts for name in grown.grown.forest.domains}
    for number, (name, one) in enumerate(own.items()):
        assert max(range(len(own)), key=one.weights.__getitem__) == number, name


def test_the_expert_that_carries_a_token_is_the_one_with_the_largest_product_of_weight_and_probability(
    grown: GrownForest,
) -> None:
    ledger, text = grown.driver.ledger, grown.text("kitchen")
    refs = [Ref("model", expert.identity) for expert in grown.grown.forest.experts]
    stack = stack_of(ledger, refs, text, "test")
    blocks = Blocks([ledger.open_file(ledger.get(ref), "tokens.npy") for ref in text.tokens["test"]])
    tokens_BT = blocks.take(np.arange(2))
    tokenizer = open_tokenizer(ledger, grown.prepared.tokenizer)
    mixing = Mixing(torch.log(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)), FULL)
    found = find_excerpt(stack, mixing, tokens_BT, tokenizer, 200)
    row, start, end = longest_stretch(stack.documents_BT[:2].numpy(), 200)
    logp_ET = stack.take(row, row + 1)[0][:, 0].tolist()
    ids = tokens_BT[row, start:end].tolist()
    kept = [place for place, token in enumerate(ids) if token != tokenizer.end_of_text]
    assert len(found) == len(kept)
    for piece, place in zip(found, kept, strict=True):
        joint = [
            prior * math.exp(math.fsum(logp_ET[expert][: start + place + 1]))
            for expert, prior in enumerate((0.2, 0.5, 0.3))
        ]
        assert piece.expert == max(range(3), key=joint.__getitem__)
        assert piece.share == pytest.approx(max(joint) / sum(joint), rel=1e-6)
    begins = replace(tokenizer, first_token=ids[kept[0]])
    without = find_excerpt(stack, mixing, tokens_BT, begins, 200)
    assert len(without) == len(kept) - ids.count(ids[kept[0]]), "nor is a token that begins documents shown"
    document = "".join(piece.text for piece in found)
    assert any(document in one for one in documents_of(ledger, text.identity, "test"))


def test_the_longest_stretch_is_of_one_document_and_never_of_padding() -> None:
    documents_BT = np.array([[0, 0, 1, 1, 1], [1, 2, 2, 2, 2], [3, -1, -1, -1, -1]])
    assert longest_stretch(documents_BT, 200) == (1, 1, 5)
    assert longest_stretch(documents_BT, 3) == (0, 2, 5)


def test_overlaps_are_shares_of_each_texts_test_windows(founded_plan: Plan) -> None:
    driver = in_process(founded_plan)
    prepared = prepare(founded_plan, driver)
    found = read_overlaps(prepared, driver.ledger)
    for text in report_texts(prepared, driver):
        assert list(found[text.name]) == ["kitchen", "harbour"]
        seen = text.test_windows_in_training / text.test_windows
        assert max(found[text.name].values()) <= seen <= sum(found[text.name].values())


@pytest.fixture
def run_plan_copy(founded_plan: Plan, tmp_path: Path) -> Plan:
    return copy_store(founded_plan, tmp_path / "store")


def test_a_page_is_made_from_the_store_alone_and_nothing_is_added_to_it(
    run_plan_copy: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger.open(run_plan_copy.store)
    write_timeline(ledger, "20260102-030405-host-7", made_timeline(["kitchen", "harbour"], ["kitchen"]))
    ledger.storage.create(run_key("20260102-030406-host-8", TIMELINE_FILE), b"{}")
    before = {entry.key for entry in ledger.storage.list("")}
    plan_path = tmp_path / "plan.yaml"
    written = yaml.safe_dump(
        run_plan_copy.model_dump(mode="json", exclude_unset=True), default_flow_style=True
    )
    plan_path.write_text(f"# a remark <of mine>\r\n{written}", newline="")
    page = tmp_path / "page" / "report.html"
    assert run_command(lambda: app(["report", str(plan_path), "--to", str(page.parent)])) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert run_command(lambda: app(["report", str(plan_path), str(plan_path), "--to", str(page.parent)])) == 2
    assert "a page is of one plan" in capsys.readouterr().err
    assert {entry.key for entry in ledger.storage.list("")} == before
    html = page.read_text()
    for said in (
        "ensemble, calibrated",
        "20260102-030405-host-7",
        "test documents in training",
        "founded by tiny",
        " % on domains",
        f"<pre># a remark &lt;of mine&gt;\n{escape(written)}",
    ):
        assert said in html
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


def test_a_plan_that_was_run_in_its_folder_is_done_from_every_other(
    run_plan_copy: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts had other identities there: they were read again, and the forest was not evaluated."""
    folder = tmp_path / "plans"
    (folder / "text").mkdir(parents=True)
    fields = run_plan_copy.model_dump(mode="json", exclude_unset=True) | {"store": "../store"}
    for text in (*fields["domains"], *fields["targets"]):
        shutil.copy(text["text"][0], folder / "text" / f"{text['name']}.jsonl")
        text["text"] = f"text/{text['name']}.js*"
    (folder / "plan.yaml").write_text(yaml.safe_dump(fields))
    (tmp_path / "link").symlink_to("plans")
    (tmp_path / "elsewhere").mkdir()

    def made(cwd: Path, plan: str | Path, *commands: tuple[str, ...]) -> set[str]:
        monkeypatch.chdir(cwd)
        for command in commands:
            named = [str(plan) if part == "PLAN" else part for part in command]
            assert run_command(lambda named=named: app(named)) == 0, capsys.readouterr().err
        return {entry.key for entry in Ledger.open(run_plan_copy.store).storage.list("artifacts/")}

    run, merge = ("run", "PLAN", "--in-process"), ("merge", "PLAN", "--for", "kitchen", "--to")
    in_place = made(folder, "plan.yaml", run, (*merge, "merged"))
    others = [("evaluate", "PLAN", "--in-process"), ("forest", "show", "PLAN"), run]
    assert made(tmp_path, "link/plan.yaml", *others, (*merge, "merged")) == in_place
    assert made(tmp_path / "elsewhere", "../plans/plan.yaml", ("report", "PLAN", "--to", "page")) == in_place
    assert "not evaluated" not in (tmp_path / "elsewhere/page/report.html").read_text()
    capsys.readouterr()
    assert made(Path("/"), folder / "plan.yaml", ("plan", "PLAN", "--json")) == in_place
    assert {step["state"] for step in json.loads(capsys.readouterr().out)["steps"]} == {DONE}


def logged(plan: Plan, told: list[Any]) -> Driver:
    """A driver that keeps a log of its run, and tells what reaches the places where curves go."""
    driver = in_process(plan)

    def finish(rows: Any, file: Path | None) -> None:
        told.append((list(rows), None if file is None else file.read_text()))

    driver.run_log = RunLog(driver.ledger, RunEvents("run"), finish)
    return driver


def test_a_run_ends_with_its_page_in_the_store_and_passes_it_on(run_plan_copy: Plan) -> None:
    told: list[Any] = []
    driver = logged(run_plan_copy, told)
    run = run_plan(run_plan_copy, driver)
    address = finish_run(run_plan_copy, driver, run)
    assert driver.run_log is not None
    assert address == str(Path(run_plan_copy.store, "logs", driver.run_log.run, "report.html"))
    ((rows, html),) = told
    assert html == Path(address).read_text()
    assert rows == table_of(run.verdict)


def test_a_run_does_not_fail_for_its_page(
    run_plan_copy: Plan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    driver = logged(run_plan_copy, told)
    run = run_plan(run_plan_copy, driver)
    monkeypatch.setattr("btm_cluster.operations.report.render", lambda _: 1 / 0)
    assert finish_run(run_plan_copy, driver, run) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the report was not written: division by zero" in caplog.text
    assert [html for _, html in told] == [None]


def test_a_plan_that_was_never_run_has_no_page_and_the_remedy_is_named(plan: Plan) -> None:
    with pytest.raises(UserError, match=r"no forest in .*\n.*btm run PLAN"):
        page_of(plan, Ledger.open(plan.store))


def test_a_version_that_was_not_evaluated_is_passed_over(run_plan_copy: Plan) -> None:
    driver = in_process(run_plan_copy)
    ledger = driver.ledger
    assert run_command(lambda: app(["forest", "remove", "kitchen", "--store", run_plan_copy.store])) == 0
    page = page_of(run_plan_copy, ledger)
    assert "This is version 1, the newest that was evaluated; the forest is at version 2" in page.lead
    assert page.headline.startswith(("Worth it", "Not worth it", "Undecided"))
