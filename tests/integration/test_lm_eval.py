"""lm-evaluation-harness measures a forest's ensemble, by local tasks, and comes to our own figures."""

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte as harness_bits_per_byte
from lm_eval.api.registry import Registry
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM

import btm_cluster as btm
from btm_cluster.data.blocks import Blocks, pack_blocks, tokenised
from btm_cluster.data.tokenizer import open_pretrained_tokenizer
from btm_cluster.driver.preparation import prepare
from btm_cluster.equations.perplexity import BYTES, bits_per_byte
from btm_cluster.errors import UserError
from btm_cluster.evaluation.scoring import score_models, stack_of
from btm_cluster.language_model.scoring import score_blocks
from btm_cluster.ledger import Ref
from btm_cluster.lm_eval import ENTRY_POINT, MODEL
from btm_cluster.lm_eval.__main__ import main
from btm_cluster.lm_eval.model import ForestLM
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources
from btm_cluster.steps.stored import documents_of
from tests.chatting import write_tokenizer
from tests.conftest import made_up_documents, write_jsonl
from tests.integration.conftest import BLOCK, WrittenForest
from tests.integration.test_serving import serving

ROOT = Path(__file__).parents[2]


def write_tasks(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """Tasks of the harness on local files."""
    fields: dict[str, dict[str, Any]] = {
        "perplexity": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "greedy": {
            "output_type": "generate_until",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["☃"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    folder.mkdir()
    for name, task in fields.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        data = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        local = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local | task))
    return folder


def test_the_harness_comes_to_our_own_figures(forest: WrittenForest, tmp_path: Path) -> None:
    """By its command line, with tasks of each kind."""
    documents = [*forest.test_documents("market")[:3], *forest.test_documents("harbour")[:3]]
    ensemble = btm.open_forest(forest.plan.store).ensemble()
    starts = [document[:20] for document in documents]
    written = [one.text for one in ensemble.generate(starts, 6, temperature=0)]
    choices = [[f" {document.split()[n]}" for n in (9, 11)] for document in documents]
    contexts = [" ".join(document.split()[:9]) for document in documents]
    rows: dict[str, list[dict[str, Any]]] = {
        "perplexity": [{"text": document} for document in documents],
        "choice": [
            {"context": context, "choices": two, "answer": 0}
            for context, two in zip(contexts, choices, strict=True)
        ],
        "greedy": [{"context": start, "answer": text} for start, text in zip(starts, written, strict=True)],
    }
    tasks = write_tasks(tmp_path / "tasks", rows)
    command = [sys.executable, "-m", "btm_cluster.lm_eval", "--model", "btm", "--include_path", str(tasks)]
    command += [
        "--model_args",
        f"store={forest.plan.store}",
        "--tasks",
        "local_perplexity,local_choice,local_greedy",
    ]
    command += ["--output_path", str(tmp_path / "found"), "--log_samples", "--batch_size", "auto"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(next((tmp_path / "found").rglob("results_*.json")).read_text())
    assert found["config"]["experts"] == list(ensemble.names)

    nats = -sum(sum(forest.written_out(forest.tokenizer.encode(document))[1]) for document in documents)
    bytes_ = sum(len(document.encode()) for document in documents)
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    perplexity = found["results"]["local_perplexity"]
    assert perplexity["bits_per_byte,none"] == pytest.approx(nats / bytes_ / math.log(2), rel=1e-5)
    assert perplexity["byte_perplexity,none"] == pytest.approx(math.exp(nats / bytes_), rel=1e-5)
    assert perplexity["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-5)
    ours = ensemble.score_together(documents)
    assert perplexity["bits_per_byte,none"] == pytest.approx(ours.ensemble.bits_per_byte, rel=1e-6)

    right = [first > second for first, second in chosen(forest, contexts, choices)]
    assert len(set(right)) == 2, "or any answer would do"
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert found["results"]["local_greedy"]["exact_match,none"] == 1


def chosen(forest: WrittenForest, contexts: list[str], choices: list[list[str]]) -> list[list[float]]:
    """The log-probability of each choice after its context, read without any of our code."""

    def after(context: str, choice: str) -> float:
        ids = forest.tokenizer.encode(context + choice)[-BLOCK:]
        answer = len(forest.tokenizer.encode(context + choice)) - len(forest.tokenizer.encode(context))
        return sum(forest.written_out(ids)[1][-answer:])

    return [[after(context, one) for one in two] for context, two in zip(contexts, choices, strict=True)]


@pytest.fixture(scope="module")
def fitted(forest: WrittenForest) -> ForestLM:
    return ForestLM(plan=str(forest.plan_path), domain="market", batch_size=2, device="cuda:0")


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0)  # type: ignore[arg-type]


def test_the_verdicts_bits_per_byte_are_the_harnesss_on_the_same_text(
    forest: WrittenForest, tmp_path: Path
) -> None:
    # Of a split, the first document is read alone; the harness has one window for what fits into a block.
    short = [f"Nº {number}: ✓" for number in range(60)]
    target = {"name": "short", "text": str(write_jsonl(tmp_path / "short.jsonl", short))}
    fields = forest.plan.model_dump(mode="json") | {"targets": [target]}
    prepared = prepare(Plan.model_validate(fields), forest.driver)
    (text,) = [text for text in prepared.texts if text.name == "short"]
    document = next(documents_of(forest.ledger, text.identity, "test"))
    assert len(forest.tokenizer.encode(document)) < BLOCK
    opened = btm.open_forest(forest.plan.store)
    for written in (opened.seed.model(), opened.tokenizer):
        written.save_pretrained(tmp_path)
    measured = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=1)
    (logp,) = measured.loglikelihood_rolling([request("loglikelihood_rolling", document)], disable_tqdm=True)
    seed = Ref("model", opened.seed.identity)
    score_models(prepared, {seed: "seed"}, [text], forest.driver, ["test"])
    stack = stack_of(forest.ledger, [seed], text, "test")
    found = bits_per_byte(stack.sums()[0, BYTES, 0], stack.sizes()[BYTES, 0])
    expected = harness_bits_per_byte([(logp, len(document.encode()))])
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("begins", ["<s>", None])
def test_a_document_measures_as_in_the_harness_whether_or_not_its_tokenizer_begins_texts(
    begins: str | None, tmp_path: Path
) -> None:
    """As Llama's tokenizer does, and Qwen's does not. By itself the harness has the first token predicted after
    itself."""
    folder = write_tokenizer(tmp_path / "model", None, begins)
    tokenizer = open_pretrained_tokenizer(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.first_token, "eos_token_id": tokenizer.end_of_text}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=448, initializer_range=0.2, **shape, **ends)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    document = made_up_documents("kitchen", 1)[0]
    packed = pack_blocks(tokenised([document], tokenizer), tokenizer, 400, keep_rest=True)
    np.save(tmp_path / "tokens.npy", packed.tokens)
    how = Resources(1, 0, 1, 1, "float32", False)
    files = score_blocks(model, Blocks([tmp_path / "tokens.npy"]), tokenizer.first_token, how, tmp_path)
    length = int((packed.documents >= 0).sum()) - 1
    ours = float(np.load(files["logp.npy"])[0, :length].astype(float).sum())
    measured = HFLM(pretrained=str(folder), device="cpu", batch_size=1, add_bos_token=False)
    (logp,) = measured.loglikelihood_rolling([request("loglikelihood_rolling", document)], disable_tqdm=True)
    assert length < 400
    assert ours == pytest.approx(logp, rel=1e-6)


def test_a_plans_mixture_measures_as_it_scores(fitted: ForestLM, forest: WrittenForest) -> None:
    documents = forest.test_documents("market")[:4]
    opened = btm.open_forest(forest.plan_path, in_process=True).ensemble("market")
    found = fitted.loglikelihood_rolling(
        [request("loglikelihood_rolling", document) for document in documents], disable_tqdm=True
    )
    for document, logp, ours in zip(documents, found, opened.score(documents), strict=True):
        bits = -logp / math.log(2) / len(document.encode())
        assert bits == pytest.approx(ours.ensemble.bits_per_byte, rel=1e-6)
    assert (fitted.max_length, fitted.max_gen_toks) == (BLOCK, 256)
    assert fitted.prefix_token_id == forest.tokenizer.first_token


def test_continuations_are_told_from_greedy_ones_and_long_contexts_keep_their_ends(fitted: ForestLM) -> None:
    likeliest = fitted.generate_until(
        [request("generate_until", "a b", {"until": [], "max_gen_toks": 4})], disable_tqdm=True
    )[0]
    asked = [
        ("a b", likeliest),
        ("a b", likeliest + "☃"),
        ("", "a b"),
        ("word " * 40 + "a b", " c"),
        ("b", ""),
    ]
    (greedy, other, alone, cut, nothing) = fitted.loglikelihood(
        [request("loglikelihood", *pair) for pair in asked], disable_tqdm=True
    )
    assert greedy[1]
    assert not other[1]
    assert other[0] < greedy[0] < 0
    rolling = fitted.loglikelihood_rolling([request("loglikelihood_rolling", "a b")], disable_tqdm=True)
    assert alone[0] == pytest.approx(rolling[0], rel=1e-6), (
        "the first token is what an empty context stands for"
    )
    ids = fitted.tok_encode("word " * 40 + "a b c")[-BLOCK:]
    (said,) = fitted._ensemble.engine.score([ids])
    assert cut[0] == pytest.approx(float(said.logp_T[-1]), rel=1e-6)
    assert nothing == (0.0, True)
    with pytest.raises(UserError, match="a continuation is longer than a block"):
        fitted.loglikelihood([request("loglikelihood", "a", " word" * 60)], disable_tqdm=True)


def test_texts_are_drawn_as_a_task_asks_and_in_the_room_that_there_is(fitted: ForestLM) -> None:
    def write(context: str, **settings: Any) -> str:
        asked = [request("generate_until", context, {"until": ["☃"]} | settings)]
        return str(fitted.generate_until(asked, disable_tqdm=True)[0])

    greedy = write("a b", max_gen_toks=12)
    assert write("a b", max_gen_toks=12, until=[greedy[3], ""]) == greedy[: greedy.index(greedy[3])]
    assert write("a b", max_new_tokens=12, do_sample=True, temperature=1.0, top_k=1) == greedy
    drawn = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": -1}
    both = fitted.generate_until([request("generate_until", "a b", dict(drawn))] * 2, disable_tqdm=True)
    assert both[0] != both[1], "each request has random numbers of its own"
    long = "word " * 40 + "a b"
    kept = fitted._ensemble.text_tokenizer.decode(fitted.tok_encode(long)[-BLOCK // 2 :])
    assert write(long, max_gen_toks=200) == write(kept, max_gen_toks=200) != ""
    with pytest.raises(UserError, match=r"settings that an ensemble has not\n +found: +num_beams"):
        write("a b", num_beams=4)


def test_the_harness_gets_the_same_figures_from_a_server_as_from_the_class(
    forest: WrittenForest, fitted: ForestLM, tmp_path: Path
) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    btm.open_forest(forest.plan.store).tokenizer.save_pretrained(str(tmp_path))
    documents = [document[:20] for document in forest.test_documents("market")[:3]]
    pairs = [("a b", " c"), ("word word", "a b"), ("b", fitted.generate_until([greedy("b", 3)])[0])]
    requests = {
        "loglikelihood_rolling": [request("loglikelihood_rolling", document) for document in documents],
        "loglikelihood": [request("loglikelihood", *pair) for pair in pairs],
        "generate_until": [greedy("a b", 6), greedy("word", 6)],
    }
    assert all(len(fitted.tok_encode(document)) < BLOCK - 2 for document in documents)
    with serving(forest.plan.store, fitted._ensemble.mixture) as server:
        url = f"{server.url}/v1/completions"
        harness = LocalCompletionsAPI(
            base_url=url,
            model="ensemble",
            tokenizer_backend="huggingface",
            tokenizer=str(tmp_path),
            max_length=BLOCK,
            batch_size=2,
        )
        for kind, asked in requests.items():
            served, ours = (getattr(model, kind)(asked) for model in (harness, fitted))
            if kind == "generate_until":
                assert served == ours
            elif kind == "loglikelihood":
                assert [one[1] for one in served] == [one[1] for one in ours] == [False, False, True]
                assert [one[0] for one in served] == pytest.approx([one[0] for one in ours], abs=1e-5)
            else:
                assert served == pytest.approx(ours, abs=1e-4)


def greedy(prompt: str, tokens: int) -> Instance:
    return request("generate_until", prompt, {"until": ["☃"], "max_gen_toks": tokens})


def test_the_model_is_registered_by_a_name_of_its_own(forest: WrittenForest, tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry_points = project["entry-points"]["lm_eval.models"]
    assert entry_points == {MODEL: ENTRY_POINT}
    registry: Registry[Any] = Registry("model")
    registry.register(MODEL, target=EntryPoint(MODEL, entry_points[MODEL], "lm_eval.models"))
    assert registry.get(MODEL) is ForestLM
    for arguments, message in (
        ({}, "found:    neither"),
        ({"store": "s", "plan": "p"}, "found:    both"),
        ({"store": str(tmp_path / "none")}, "there is no forest in"),
        ({"store": forest.plan.store, "domain": "market"}, "needs a plan"),
    ):
        with pytest.raises(UserError) as caught:
            ForestLM(**arguments)
        assert message in str(caught.value)


def test_the_command_tells_errors_of_ours_and_a_missing_harness_in_a_few_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise UserError("there is no forest")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no forest\n"
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit, match="lm-evaluation-harness cannot be imported"):
        main()
