"""The Python API: it gives what the commands of the same names give."""

import ast
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import btm_cluster as btm
from btm_cluster import session
from btm_cluster.cli import app, run_command
from btm_cluster.errors import UserError
from btm_cluster.evaluation.rows import SEED
from btm_cluster.forest import take_out
from btm_cluster.ledger.versions import append_next
from btm_cluster.session import opened_driver, opened_view
from btm_cluster.stopping import Interruption, handling
from tests.conftest import DOMAINS, in_process, made_up_documents, write_jsonl
from tests.integration.conftest import BLOCK, WrittenForest, copy_store

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "reference" / "python.ipynb"

Command = Callable[..., Any]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The values that a command prints as JSON, one after the other."""

    def call(*arguments: str | Path) -> Any:
        capsys.readouterr()
        whole = [*map(str, arguments), "--json"]
        assert run_command(lambda: app(whole, standalone_mode=False)) == 0
        out, found, reader = capsys.readouterr().out.strip(), [], json.JSONDecoder()
        while out:
            value, end = reader.raw_decode(out)
            found.append(value)
            out = out[end:].strip()
        return found

    return call


@pytest.fixture(scope="module")
def planned(forest: WrittenForest) -> btm.OpenForest:
    return btm.open_forest(forest.plan_path, in_process=True)


@pytest.fixture(scope="module")
def stored(forest: WrittenForest) -> btm.OpenForest:
    return btm.open_forest(forest.plan.store)


@pytest.fixture(scope="module")
def ensemble(stored: btm.OpenForest) -> btm.OpenEnsemble:
    return stored.ensemble()


def test_every_name_is_there_for_type_checkers_too_and_is_imported_when_it_is_used() -> None:
    tree = ast.parse((ROOT / "btm_cluster" / "__init__.py").read_text(encoding="utf-8"))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"
    ]
    typed = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted(typed) == btm.__all__
    for name, module in typed.items():
        assert getattr(btm, name) is getattr(sys.modules[str(module)], name)
    assert set(btm.__all__) < set(dir(btm))
    with pytest.raises(AttributeError, match="no attribute 'open_tree'"):
        btm.open_tree  # type: ignore[attr-defined]  # noqa: B018
    code = "import sys, btm_cluster as btm; btm.read_plan, btm.UserError; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_plan_may_be_given_as_plain_values(fields: dict[str, Any]) -> None:
    assert btm.read_plan(fields).name == "tiny"
    with pytest.raises(UserError, match=r"the plan has 1 problem.*\n.*block_tokens"):
        btm.read_plan(fields | {"training": {"block_tokens": 0}})


def test_a_plan_is_run_and_run_again_in_a_thread(
    fields: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread hears no signals, and a program that imports the package keeps its standard input and output."""
    monkeypatch.setattr("btm_cluster.session.end_input", None)
    caplog.set_level(logging.INFO, "btm_cluster")
    first = btm.run(fields | {"domains": fields["domains"][:2], "targets": []}, in_process=True)
    assert first.forest.domains == ("harbour", "kitchen")
    assert not first.failures
    assert first.verdict.rows["test"][0].system == "seed"
    again: list[btm.Run] = []
    plan = btm.read_plan(fields | {"domains": fields["domains"][:2], "targets": []})
    thread = threading.Thread(target=lambda: again.append(btm.run(plan, in_process=True)))
    thread.start()
    thread.join()
    assert again[0].verdict == first.verdict
    assert sum(again[0].made.values()) == 0
    assert capsys.readouterr().out == ""
    assert "seed: training update 6/6" in caplog.text


def test_signals_stop_a_call_and_never_the_program(plan: btm.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAME_SECONDS", 0)
    with handling(signal.SIG_IGN):
        before = signal.getsignal(signal.SIGINT)
        with opened_view() as view, opened_driver(view, plan, None, True) as driver:
            driver.is_asking = True
            signal.raise_signal(signal.SIGINT)  # asks to save
            for _ in range(2):
                with pytest.raises(Interruption):
                    signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before


def test_an_open_forest_says_what_it_is(stored: btm.OpenForest, forest: WrittenForest) -> None:
    assert (stored.version, stored.domains) == (1, tuple(sorted(DOMAINS)))
    assert stored.block_tokens == stored.tokenizer.model_max_length == BLOCK
    assert repr(stored) == "<forest version 1 of harbour, kitchen, orchard>"
    text = " ".join(made_up_documents("harbour", 1))[:60]
    assert stored.tokenizer(text).input_ids == forest.tokenizer.encode(text)
    ids = forest.tokenizer.encode(text)
    logp, _ = forest.written_out(ids)
    read = torch.tensor([[forest.tokenizer.first_token, *ids[: BLOCK - 1]]])
    for (name, expert), expected in zip(stored.experts.items(), logp, strict=True):
        model = expert.model()
        assert expert.name == name
        assert not model.training
        with torch.no_grad():
            said = torch.log_softmax(model(read).logits[0].double(), -1)
        found = [float(said[t, token]) for t, token in enumerate(ids[:BLOCK])]
        assert found == pytest.approx(expected[:BLOCK], abs=1e-9)
    assert stored.first_token == forest.tokenizer.first_token
    assert stored.seed.name == "the seed"
    assert stored.seed.identity == forest.grown.forest.foundation.seed
    assert stored.seed.model().num_parameters() == stored.experts["kitchen"].model().num_parameters()


def test_an_ensemble_scores_as_the_command_does(
    ensemble: btm.OpenEnsemble,
    planned: btm.OpenForest,
    forest: WrittenForest,
    command: Command,
    tmp_path: Path,
) -> None:
    texts = [text for name in ("kitchen", "market") for text in forest.test_documents(name)[:3]]
    file = write_jsonl(tmp_path / "texts.jsonl", texts)
    by_store = command("score", file, "--store", forest.plan.store)
    for one, told in zip(ensemble.score(texts), by_store, strict=False):
        assert told["ensemble"] == vars(one.ensemble)
        assert told["posterior"] == one.posterior
        assert told["domain"] == one.domain
    alone = ensemble.score(texts[0])
    assert len(alone) == 1
    assert alone[0].ensemble.perplexity == pytest.approx(by_store[0]["ensemble"]["perplexity"])
    fitted = planned.ensemble(domain="market")
    *_, told = command(
        "score", file, "--plan", forest.plan_path, "--for", "market", "--packed", "--in-process"
    )
    whole = fitted.score_together(iter(texts), packed=True)
    assert told["total"]["ensemble"] == vars(whole.ensemble)
    assert whole.tokens == told["total"]["tokens"]
    unfitted = ensemble.score_together(texts, packed=True)
    assert unfitted.experts == whole.experts
    assert unfitted.ensemble != whole.ensemble


def test_an_ensemble_writes_as_the_command_does(
    planned: btm.OpenForest, forest: WrittenForest, command: Command
) -> None:
    opened = planned.ensemble(domain="kitchen", rows=2)
    assert opened.names == forest.grown.forest.domains
    asked = ("--max-new-tokens", "8", "--top-k", "5", "--random-seed", "3", "--stop", "☃", "--show-experts")
    call = ("generate", forest.plan_path, "--prompt", "a b", "--for", "kitchen", "--in-process", *asked)
    (told,) = command(*call)
    found, *others = opened.generate(["a b", "stone", "a b"], 8, top_k=5, random_seed=3, stop="☃")
    assert (found.text, found.finish) == (told["text"], told["finish"])
    assert found.expert_weights == pytest.approx(told["expert_weights"], abs=1e-6)
    assert [piece.expert for piece in found.pieces] == [piece["expert"] for piece in told["pieces"]]
    assert others[1].text != found.text, "each prompt has random numbers of its own"
    assert opened.generate("a b", 8, temperature=0)[0].text == opened.generate("a b", 8, top_k=1)[0].text


def test_averages_are_those_of_the_commands_and_of_arithmetic(
    planned: btm.OpenForest, stored: btm.OpenForest, forest: WrittenForest, command: Command, tmp_path: Path
) -> None:
    for weights, target in (("uniform", None), ("posterior", "market")):
        named = [] if target is None else ["--for", target]
        folder = tmp_path / weights
        command("merge", forest.plan_path, "--weights", weights, *named, "--to", folder, "--in-process")
        merged = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for average in (planned.average(weights, target), *([] if target else [stored.average()])):
            assert not average.training
            assert all(torch.equal(value, merged[name]) for name, value in average.state_dict().items())
    mixed = stored.average({"kitchen": 0.75, "the seed": 0.25, "orchard": 0}).state_dict()
    kitchen, seed = (model.model().state_dict() for model in (stored.experts["kitchen"], stored.seed))
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * kitchen[name] + 0.25 * seed[name])


def test_a_verdict_is_that_of_the_run(
    planned: btm.OpenForest, forest: WrittenForest, command: Command
) -> None:
    told = json.loads(json.dumps(planned.verdict().to_json()))
    assert command("evaluate", forest.plan_path, "--in-process")[0]["verdict"] == told


def test_a_forest_is_opened_at_any_version(forest: WrittenForest, tmp_path: Path) -> None:
    plan = copy_store(forest.plan, tmp_path / "store")
    ledger = in_process(plan).ledger
    append_next(ledger, lambda newest: take_out(newest, "orchard", "removed orchard"))
    newest, first = btm.open_forest(plan.store), btm.open_forest(plan, 1, in_process=True)
    assert (newest.version, newest.domains) == (2, ("harbour", "kitchen"))
    assert newest.ensemble().names == newest.domains
    assert (first.version, first.ensemble("orchard").names) == (1, tuple(sorted(DOMAINS)))
    assert first.average("posterior", "orchard").num_parameters()
    assert set(first.verdict().rows["test"][0].cells) == {*DOMAINS, "market"}
    with pytest.raises(UserError, match=r"'orchard' was taken out|no such text"):
        btm.open_forest(plan, in_process=True).ensemble("orchard")
    for domain in newest.domains:
        append_next(ledger, lambda newest, domain=domain: take_out(newest, domain, "removed"))
    empty = btm.open_forest(plan.store)
    assert repr(empty) == "<forest version 4 of no domain>"
    for use in (empty.ensemble, empty.average):
        with pytest.raises(UserError, match="no forest with experts"):
            use()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda it: it.stored.ensemble("kitchen"), "a mixture for 'kitchen' needs a plan"),
        (lambda it: it.stored.average("learned", "kitchen"), "an average by 'learned' needs a plan"),
        (lambda it: it.stored.verdict(), "a verdict needs a plan"),
        (
            lambda it: it.stored.average({"kitchen": 0.5, "sea": 0.5}),
            "weights of models that the forest has not",
        ),
        (lambda it: it.stored.average({"kitchen": 0.5}), "weights do not sum to one"),
        (lambda it: it.stored.average({"kitchen": 1}, "kitchen"), "the same for every text"),
        (lambda it: it.planned.average("heavy", "kitchen"), "unknown"),
        (lambda it: it.planned.ensemble("sea"), "there is no such text"),
        (lambda it: it.ensemble.score(["a", " "]), "text 2 is empty"),
        (lambda it: it.ensemble.score(["a", 3]), "text 2 is no text"),
        (lambda it: it.ensemble.score(3), "texts are no text"),
        (lambda it: it.ensemble.score_together({"a": "b"}), "texts are no text"),
        (lambda it: it.ensemble.generate(5), "prompts are no text"),
        (lambda it: it.ensemble.generate(["a", None]), "prompt 2 is no text"),
        (lambda it: it.stored.documents("kitchen", "validation"), "there is no such split"),
        (lambda _: btm.read_plan(5), "this is no plan"),
        (lambda _: btm.open_forest(None), "this is no plan"),
        (lambda it: it.ensemble.score("a \ud83d"), "text 1 is no Unicode"),
        (lambda it: it.ensemble.score_together([]), "there is no text to score"),
        (lambda it: it.ensemble.generate("a", 0), "the number of new tokens is too small"),
        (lambda it: it.ensemble.generate("a", temperature=-1), "temperature is out of range"),
        (lambda it: it.ensemble.generate(["a", "word " * 40]), "prompt 2 of 2 is too long"),
        (lambda it: btm.open_forest(it.stored._ledger.storage.location, 7), "there is no forest version 7"),
        (lambda _: btm.open_forest("nowhere"), "there is no forest in"),
        (lambda _: btm.open_forest("nowhere.yaml"), "cannot read the plan nowhere.yaml"),
    ],
)
def test_a_call_that_cannot_be_met_is_one_clear_error(
    use: Callable[[Any], object],
    message: str,
    stored: btm.OpenForest,
    planned: btm.OpenForest,
    ensemble: btm.OpenEnsemble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class It:
        pass

    monkeypatch.chdir(tmp_path)
    it: Any = It()
    it.stored, it.planned, it.ensemble = stored, planned, ensemble
    with pytest.raises(UserError) as caught:
        use(it)
    assert message in str(caught.value)


RUN_NOTEBOOK = """
import sys, nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], 4)
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=sys.argv[2] + "/kernel")
NotebookClient(notebook, km=kernel, timeout=200, resources={"metadata": {"path": sys.argv[2]}}).execute()
for cell in notebook.cells:
    print(*(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout"))
"""


def test_the_notebook_of_the_docs_runs_in_a_kernel(tmp_path: Path) -> None:
    assert '"outputs": []' in NOTEBOOK.read_text(encoding="utf-8")
    environment = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN_NOTEBOOK, str(NOTEBOOK), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Worth it as an ensemble: " in done.stdout
    assert "tide Surprise(perplexity=" in done.stdout
    assert (tmp_path / "forest" / "forest" / "000001.json").is_file()


def test_the_script_of_the_docs_reproduces_a_figure_of_the_verdict(
    forest: WrittenForest, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "reference" / "perplexity.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    for named, ours in (('"forests/quickstart"', repr(forest.plan.store)), ('"python"', '"kitchen"')):
        assert named in script
        script = script.replace(named, ours)
    exec(script, {})
    rows = btm.open_forest(forest.plan_path, in_process=True).verdict().rows["test"]
    seed = next(row for row in rows if row.system == SEED)
    assert capsys.readouterr().out.strip() == f"{seed.cells['kitchen'].perplexity:.2f}"
