"""`btm score`: how surprising a text is to a grown forest, and which domain it is of."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from btm_cluster.cli import app, run_command
from btm_cluster.equations.perplexity import BYTES, TOKENS, bits_per_byte
from btm_cluster.evaluation.evaluate import evaluate
from btm_cluster.evaluation.rows import CALIBRATED_ENSEMBLE
from btm_cluster.language_model.document_scores import DocumentScorer, NamedText
from btm_cluster.language_model.ensemble_scoring import TextScores
from tests.conftest import DOMAINS, made_up_documents, write_jsonl
from tests.integration.conftest import WrittenForest

Score = Callable[..., tuple[int, str, str]]


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Score:
    """`btm score` in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        whole = ["score", *map(str, arguments)]
        return run_command(lambda: app(whole, standalone_mode=False)), *capsys.readouterr()

    return call


def lines_of(found: tuple[int, str, str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents and the total that `--json` gives."""
    assert found[0] == 0, found[2]
    *documents, total = map(json.loads, found[1].splitlines())
    return documents, total


def test_a_text_has_the_figures_that_its_tokens_written_out_have(forest: WrittenForest, score: Score) -> None:
    text = " ".join(made_up_documents("harbour", 1)) + " é☃"
    (one,), total = lines_of(score("--text", text, "--store", forest.plan.store, "--json"))
    ids = [*forest.tokenizer.encode(text), forest.tokenizer.end_of_text]
    logp, mixed = forest.written_out(ids)
    assert one["tokens"] == len(mixed) > 64, "or no document goes over several blocks"
    assert one["bytes"] == len(text.encode()) > len(text)
    for values, found in [(mixed, one["ensemble"]), *zip(logp, one["experts"].values(), strict=True)]:
        assert found["perplexity"] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-5)
        bits = -sum(values[:-1]) / math.log(2) / len(text.encode())
        assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    sums = torch.tensor([sum(values) for values in logp])
    assert list(one["posterior"].values()) == pytest.approx(torch.softmax(sums, 0).tolist(), abs=1e-3)
    assert list(one["posterior"]) == list(one["experts"]) == list(forest.grown.forest.domains)
    assert total["total"] == {"documents": 1} | {
        name: one[name] for name in total["total"] if name != "documents"
    }


def test_every_document_goes_to_its_own_domain_and_the_total_is_of_all(
    forest: WrittenForest, score: Score, tmp_path: Path
) -> None:
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [*forest.test_documents(name)[:3], " "])
        for name in sorted(DOMAINS)
    ]
    documents, total = lines_of(score(*files, "--store", forest.plan.store, "--json"))
    assert [(one["source"], one["document"]) for one in documents] == [
        (str(f), n) for f in files for n in (1, 2, 3)
    ]
    assert [one["domain"] for one in documents] == [name for name in sorted(DOMAINS) for _ in range(3)]
    for one in documents:
        own = one["experts"][one["domain"]]["perplexity"]
        assert own == min(model["perplexity"] for model in one["experts"].values())
        assert sum(one["posterior"].values()) == pytest.approx(1)
    whole = total["total"]
    assert total["skipped"] == {"an empty document": 3}
    assert (whole["documents"], whole["tokens"]) == (9, sum(one["tokens"] for one in documents))
    nats = sum(math.log(one["ensemble"]["perplexity"]) * one["tokens"] for one in documents)
    assert whole["ensemble"]["perplexity"] == pytest.approx(math.exp(nats / whole["tokens"]))
    bits = sum(one["ensemble"]["bits_per_byte"] * one["bytes"] for one in documents)
    assert whole["ensemble"]["bits_per_byte"] == pytest.approx(bits / whole["bytes"])
    assert whole["posterior"] == pytest.approx(dict.fromkeys(sorted(DOMAINS), 1 / 3), abs=0.05)

    code, out, err = score(*files, "--store", forest.plan.store)
    assert code == 0, err
    assert out.count("\n") == 1 + 9 + len(out[out.index("9 documents") :].splitlines())
    assert re.search(r"kitchen\.jsonl:2 .* kitchen (100|9\d)%", out)
    assert "note: skipped 3 × an empty document" in out


def test_packed_documents_have_the_perplexity_of_the_verdict(
    forest: WrittenForest, score: Score, tmp_path: Path
) -> None:
    grown = forest.grown
    results = evaluate(grown.prepared, grown.forest, grown.baseline, forest.driver).results
    for name in ("kitchen", "market"):
        file = write_jsonl(tmp_path / f"{name}.jsonl", forest.test_documents(name))
        result = next(one for one in results if (one.text, one.split) == (name, "test"))
        _, total = lines_of(
            score(file, "--plan", forest.plan_path, "--for", name, "--packed", "--in-process", "--json")
        )
        assert total["total"]["tokens"] == int(result.sizes_UD[TOKENS].sum())
        sums_U, sizes_U = result.logp[CALIBRATED_ENSEMBLE].sum(1), result.sizes_UD.sum(1)
        found = total["total"]["ensemble"]
        assert found["perplexity"] == pytest.approx(math.exp(-sums_U[TOKENS] / sizes_U[TOKENS]), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(float(bits_per_byte(sums_U, sizes_U)[BYTES]), rel=1e-5)
        own = forest.grown.forest.domains.index("kitchen")
        assert list(total["total"]["experts"])[own] == "kitchen"
        unknown = lines_of(score(file, "--plan", forest.plan_path, "--packed", "--in-process", "--json"))[1]
        assert unknown["total"]["ensemble"] != total["total"]["ensemble"]
        assert unknown["total"]["experts"] == total["total"]["experts"]


def test_a_plan_with_its_seed_and_a_plan_with_few_experts_score_all_models(
    forest: WrittenForest, score: Score, tmp_path: Path
) -> None:
    fields = yaml.safe_load(forest.plan_path.read_text())
    call = ("--text", "a b", "--plan", tmp_path / "plan.yaml", "--in-process")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields | {"merging": {"with_seed": True}}))
    ((one,), _) = lines_of(score(*call, "--json"))
    assert list(one["experts"]) == [*forest.grown.forest.domains, "the seed"]
    assert list(one["posterior"]) == list(forest.grown.forest.domains)
    assert re.search(r"the seed +\d+\.\d\d +\d+\.\d{4} +–", score(*call)[1])
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(fields | {"merging": {"top_k": 1}}))
    ((one,), _) = lines_of(score(*call, "--for", "kitchen", "--json"))
    assert one["ensemble"] == one["experts"]["kitchen"]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_documents_stream_by_in_order_whatever_is_scored_at_once(
    packs: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's log-probability is its id here, so that sums say which tokens a document got."""
    monkeypatch.setattr("btm_cluster.language_model.document_scores.TOKENS_AT_ONCE", at_once)
    read, seen = 0, []

    class Spelled:
        end_of_text = 1000
        begins_documents = False

        def encode(self, text: str) -> list[int]:
            return [ord(character) for character in text]

    def said(blocks: Sequence[Sequence[int]]) -> list[TextScores]:
        seen.extend(map(len, blocks))
        nothing = torch.zeros(0)
        ids = [torch.tensor(block, dtype=torch.float64) for block in blocks]
        return [
            TextScores(torch.stack([one, 2 * one]), nothing, nothing, 3 * one, nothing, nothing)
            for one in ids
        ]

    def documents() -> Any:
        nonlocal read
        for number, text in enumerate(texts):
            read = number
            yield NamedText("", number, text)

    texts = ["abc", "abcdefghij", "a", "", "abcd" * 5, "ab"]
    scorer = DocumentScorer(said, Spelled(), 4, ["one", "two"], [0, 1])  # type: ignore[arg-type]
    found = []
    for text, sums in scorer.score(documents(), packs):
        found.append((text.text, sums.logp.tolist(), sums.ends.tolist(), sums.tokens))
        assert at_once == 1000 or read <= text.number + at_once + 1, "no more is read than is scored"
    ids = [sum(map(ord, text)) + 1000 for text in texts]
    assert found == [
        (text, [n, 2.0 * n, 3.0 * n], [1000, 2000, 3000], len(text) + 1)
        for text, n in zip(texts, ids, strict=True)
    ]
    tokens = sum(len(text) + 1 for text in texts)
    whole = [4] * (tokens // 4) + [tokens % 4]
    alone = [size for text in texts for size in [4] * ((len(text) + 1) // 4) + [(len(text) + 1) % 4] if size]
    assert seen == (whole if packs else alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "btm score needs texts"),
        (("a.txt", "--text", "a", "--store", "s"), "btm score needs texts"),
        (("--text", "a"), "btm score needs a forest"),
        (("--text", "a", "--store", "s", "--plan", "p"), "btm score needs a forest"),
        (("--text", "a", "--store", "s", "--for", "t"), "--for needs a plan"),
        (("--text", " ", "--store", "s"), "--text is empty"),
        (("--text", os.fsdecode(b"caf\xe9"), "--store", "s"), "--text is no UTF-8"),
        (("none.txt", "--store", "s"), "matches no file"),
        (("a.pdf", "--store", "s"), "files that are not read"),
        (("a.txt", "--field", "body", "--store", "s"), "leave `field` out, or name files that have rows"),
        (("--text", "a", "--store", "s"), "there is no forest with experts in"),
        (("empty.txt", "--store", "STORE"), "there is no text to score"),
        (("bad.jsonl", "--store", "STORE"), "bad.jsonl:2: a line that is not JSON"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_error(
    arguments: tuple[str, ...],
    message: str,
    forest: WrittenForest,
    score: Score,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, data in {
        "a.txt": "a",
        "a.pdf": "a",
        "empty.txt": "\n",
        "bad.jsonl": '{"text": "a"}\n}\n',
    }.items():
        (tmp_path / name).write_text(data)
    code, _, err = score(*(str(forest.plan.store) if one == "STORE" else one for one in arguments))
    assert code == 2
    said = [line for line in err.splitlines() if " INFO " not in line]
    assert said[0].startswith("error: ")
    assert message in err


def test_bad_documents_are_skipped_where_that_is_asked_for(
    forest: WrittenForest, score: Score, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n}\n{"text": "b"}\n')
    documents, total = lines_of(
        score(tmp_path / "bad.jsonl", "--bad-documents", "skip", "--store", forest.plan.store, "--json")
    )
    assert len(documents) == 2
    assert list(total["skipped"].values()) == [1]
