"""Domains found in unlabelled text: known topics come back, balanced,
streaming, and the model can be used again."""

import gzip
import json
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from btm_cluster.cli import app, run_command
from btm_cluster.data.clusters import Clusters, cluster_names, find_clusters, load_clusters, save_clusters
from btm_cluster.data.sources import read_documents
from btm_cluster.errors import TextError, UserError
from btm_cluster.operations.discover import BATCH_DOCUMENTS, Discovery, assign, discover, draw_sample, place
from btm_cluster.plan import DomainPlan, ReadingPlan, TextPlan
from tests.conftest import made_up_documents, write_jsonl

TOPICS = ("kitchen", "harbour", "orchard", "glacier")
Btm = Callable[..., tuple[int, str, str]]


def labelled_documents(sizes: tuple[int, ...] = (90, 90, 90, 90)) -> dict[str, str]:
    """Documents of made-up topics, and the topic of each, with the topics mixed."""
    labelled = {
        text: topic
        for topic, size in zip(TOPICS, sizes, strict=False)
        for text in made_up_documents(topic, size)
    }
    return dict(sorted(labelled.items()))


def source(*paths: Path | str) -> TextPlan:
    return TextPlan(name="unlabelled", text=tuple(map(str, paths)))


def documents_in(file: str | Path) -> list[str]:
    """What a plan would read there."""
    return [item.text for item in read_documents(source(file), ReadingPlan())]  # type: ignore[union-attr]


def purity(found: Discovery, labels: dict[str, str]) -> float:
    """Share of the documents whose cluster mostly holds their topic."""
    per_cluster = [Counter(labels[text] for text in documents_in(str(c.file))) for c in found.clusters]
    return sum(max(counts.values()) for counts in per_cluster) / len(labels)


@pytest.fixture(scope="module")
def model() -> Clusters:
    return find_clusters(list(labelled_documents()), 4, random_seed=0)


@pytest.fixture
def btm(capsys: pytest.CaptureFixture[str]) -> Btm:
    """The command line in this process: exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_command(lambda: app([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


def test_planted_topics_are_found_again_and_each_file_is_a_domain_that_a_plan_reads(tmp_path: Path) -> None:
    labels = labelled_documents()
    text = write_jsonl(tmp_path / "text.jsonl", list(labels))
    found = discover(source(text), ReadingPlan(), 4, tmp_path / "found")
    assert purity(found, labels) > 0.98
    assert sorted(text for c in found.clusters for text in documents_in(str(c.file))) == sorted(labels)
    snippet = yaml.safe_load((tmp_path / "found" / "domains.yaml").read_text())
    domains = [DomainPlan.model_validate(domain) for domain in snippet["domains"]]
    assert [(d.name, d.text) for d in domains] == [(c.name, (c.file,)) for c in found.clusters]
    for cluster in found.clusters:
        held = documents_in(str(cluster.file))
        assert (cluster.documents, cluster.characters) == (len(held), sum(map(len, held)))


def test_the_words_shown_are_the_topics_own(model: Clusters) -> None:
    for words in model.words:
        topics = [{t for t in TOPICS if set(word) <= set(t)} for word in words]
        assert len(words) == 10
        assert set.intersection(*topics), words


@pytest.mark.parametrize("sample", [100, 10_000])
def test_balance_holds_on_the_whole_text_though_its_topics_differ_in_size(
    tmp_path: Path, sample: int
) -> None:
    labels = labelled_documents((300, 40, 40, 20))
    text = write_jsonl(tmp_path / "text.jsonl", list(labels))
    found = discover(source(text), ReadingPlan(), 4, tmp_path / "found", sample_documents=sample)
    assert found.sampled == min(sample, 400)
    assert sum(c.documents for c in found.clusters) == 400
    assert max(c.documents for c in found.clusters) <= math.ceil(1.1 * 100)
    # Prices alone, without turning anything away: near balance on what they were fitted to.
    again = assign(source(text), ReadingPlan(), tmp_path / "found", None)
    if sample > 400:
        assert [c.documents for c in again.clusters] == pytest.approx([100] * 4, abs=6)


def test_the_same_text_and_seed_give_the_same_bytes_and_the_order_of_files_changes_no_model(
    tmp_path: Path,
) -> None:
    labels = list(labelled_documents())
    whole = write_jsonl(tmp_path / "whole.jsonl", labels)
    turned = [
        write_jsonl(tmp_path / "a.jsonl", labels[200:]),
        write_jsonl(tmp_path / "b.jsonl", labels[:200]),
    ]
    for name, text in (("one", source(whole)), ("two", source(whole)), ("three", source(*turned))):
        discover(text, ReadingPlan(), 4, tmp_path / name, random_seed=7, sample_documents=250)
    one, two, three = (
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two", "three")
    )
    del one["domains.yaml"], two["domains.yaml"], three["domains.yaml"]  # these name their folder
    assert one == two
    for name in ("clusters.json", "vocabulary.json", "clusters.safetensors"):
        assert one[name] == three[name]
    assert set(one) == {"clusters.json", "vocabulary.json", "clusters.safetensors"} | {
        f"cluster-{i}.jsonl.zst" for i in range(4)
    }


class Watched(str):
    """A document of which it is known whether it is still held."""


def test_neither_reading_for_the_sample_nor_placing_holds_more_than_two_batches(
    model: Clusters, tmp_path: Path
) -> None:
    alive: weakref.WeakSet[Watched] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[str]:
        nonlocal most
        for text in made_up_documents("kitchen", 5 * BATCH_DOCUMENTS):
            document = Watched(text)
            alive.add(document)
            most = max(most, len(alive))
            yield document
            del document

    sample = draw_sample(stream(), 50, random_seed=0)
    assert (len(sample.texts), sample.documents) == (50, 5 * BATCH_DOCUMENTS)
    assert most <= 2
    placed = place(model, stream(), None, tmp_path, tmp_path)
    assert sum(c.documents for c in placed) == 5 * BATCH_DOCUMENTS
    assert BATCH_DOCUMENTS <= most <= 2 * BATCH_DOCUMENTS + 2


def test_a_sample_hangs_on_content_and_seed_alone_and_takes_a_duplicate_once() -> None:
    labels = list(labelled_documents())
    sample = draw_sample(labels, 100, random_seed=0)
    assert draw_sample([*reversed(labels), *labels], 100, random_seed=0).texts == sample.texts
    assert draw_sample(labels, 100, random_seed=1).texts != sample.texts
    assert set(sample.texts) <= set(labels)
    assert sorted(draw_sample([*labels, *labels], 10**6, random_seed=0).texts) == sorted(labels)


def test_a_saved_model_is_no_pickle_and_places_text_as_the_one_that_was_saved(
    model: Clusters, tmp_path: Path
) -> None:
    save_clusters(model, tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = load_clusters(tmp_path)
    texts = [*made_up_documents("harbour again", 20), "", "words that nobody has seen"]
    assert torch.equal(loaded.costs(texts), model.costs(texts))
    assert (loaded.names, loaded.words, loaded.vocabulary) == (model.names, model.words, model.vocabulary)


def test_a_text_without_a_known_word_is_equally_far_from_all_clusters(model: Clusters) -> None:
    squared_ED = model.squared_distances(["", "☃ 123 ÷", made_up_documents("kitchen", 1)[0]])
    assert (squared_ED[:, :2] == 1).all()
    assert squared_ED[:, 2].min() < 0.9


def test_new_documents_go_to_the_clusters_of_their_topics_by_their_names_of_now(
    btm: Btm, tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", list(labelled_documents()))
    assert btm("discover", text, "--clusters", "4", "--to", tmp_path / "found")[0] == 0
    listed = tmp_path / "found" / "clusters.json"
    rows = json.loads(listed.read_text())
    harbour = next(
        i for i, row in enumerate(rows) if all(set(word) <= set("harbour") for word in row["words"][:3])
    )
    rows[harbour]["name"] = "sea"
    listed.write_text(json.dumps(rows))
    new = write_jsonl(tmp_path / "new.jsonl", made_up_documents("harbour", 120)[90:])
    code, out, err = btm(
        "discover", new, "--model", tmp_path / "found", "--to", tmp_path / "placed", "--json", "--quiet"
    )
    assert (code, err) == (0, "")
    counts = {cluster["name"]: cluster["documents"] for cluster in json.loads(out)["clusters"]}
    assert counts["sea"] == 30
    assert len(documents_in(tmp_path / "placed" / "sea.jsonl.zst")) == 30


def test_topics_in_any_script_are_told_apart_and_come_back_as_they_were(tmp_path: Path) -> None:
    languages = {
        "greek": "θάλασσα καράβι λιμάνι άνεμος κύμα ψάρι",
        "hindi": "हिन्दी किताब विद्यालय अध्यापक क्षेत्र विद्यार्थी",
        "chinese": "厨房 做饭 米饭 蔬菜 豆腐 酱油",
        "emoji": "🙂snow ❄ice\u0301 winter\u2028glacier \U0001f3d4 cold\r\n",
    }
    labels = {
        f"{' '.join(words.split(' ')[i % 3 :])} №{i}": name
        for name, words in languages.items()
        for i in range(20)
    }
    text = write_jsonl(tmp_path / "text.jsonl", list(labels))
    found = discover(source(text), ReadingPlan(), 4, tmp_path / "found")
    assert purity(found, labels) == 1
    shown = {word for cluster in found.clusters for word in cluster.words}
    assert {"καράβι", "विद्यालय", "饭", "winter"} <= shown
    assert sorted(text for c in found.clusters for text in documents_in(str(c.file))) == sorted(labels)


def test_empty_documents_are_left_out_and_bad_lines_are_refused_or_counted_as_in_a_plan(
    btm: Btm, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) for text in labelled_documents()]
    lines[5:5] = ['{"text": ""}', '{"text": " \\n"}', "{broken", '{"other": 1}']
    file = tmp_path / "text.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    call = ("discover", file, "--clusters", "4", "--to", tmp_path / "found")
    code, _, err = btm(*call)
    assert code == 2
    assert f"{file}:8" in err
    assert not (tmp_path / "found").exists()
    code, out, _ = btm(*call, "--bad-documents", "skip")
    assert code == 0
    assert "skipped 2 × an empty document" in out
    assert "skipped 1 × a line that is not JSON in UTF-8" in out
    assert sum(len(documents_in(f)) for f in (tmp_path / "found").glob("*.zst")) == len(lines) - 4


@pytest.mark.parametrize(
    ("documents", "found"),
    [
        (["one two", "three four"], "2 documents that can be told apart"),
        (["the same words"] * 30, "1 documents that can be told apart"),
        (["Again and again", "again AND again", "and again, again!"], "documents that can be told apart"),
        (["1 2 3", "4 5 6", "7 8 9", "± ÷ ="], "without two letters in a row"),
        ([], "0 documents that can be told apart"),
    ],
)
def test_too_few_documents_for_the_clusters_are_refused_with_their_number(
    documents: list[str], found: str, tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", documents)
    with pytest.raises(TextError) as refused:
        discover(source(text), ReadingPlan(), 3, tmp_path / "found")
    assert found in refused.value.found
    assert refused.value.remedy
    assert not (tmp_path / "found").exists()


def test_a_text_that_grows_while_it_is_read_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", list(labelled_documents()))

    def grow(_: str) -> None:
        with text.open("a") as file:
            file.write('{"text": "one more document"}\n')

    with pytest.raises(TextError, match="changed while it was read"):
        discover(source(text), ReadingPlan(), 4, tmp_path / "found", say=grow)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("text.jsonl",), "neither --clusters nor --model"),
        (("text.jsonl", "--clusters", "2", "--model", "m"), "both --clusters and --model"),
        (("text.jsonl", "--clusters", "2"), "add --to FOLDER"),
        (("text.jsonl", "--clusters", "2", "--to", "."), "already exists"),
        (("text.jsonl", "--clusters", "2", "--to", "/proc/none/x"), "cannot write to /proc/none/x"),
        (("text.jsonl", "--clusters", "2", "--to", "/dev/null/x"), "/dev/null, a file"),
        (("--clusters", "2", "--to", "new"), "neither files nor --dataset"),
        (("text.jsonl", "--dataset", "d", "--clusters", "2", "--to", "new"), "both files and --dataset"),
        (("http://host/text", "--clusters", "2", "--to", "new"), "s3://bucket/key"),
        (("none.jsonl", "--clusters", "2", "--to", "new"), "matches no file"),
        (("text.txt", "--clusters", "2", "--to", "new", "--field", "body"), "only where files have rows"),
        (
            ("--dataset", "d", "--clusters", "2", "--to", "new", "--delimiter", "x"),
            "nothing beside a `dataset`",
        ),
        (("text.jsonl", "--clusters", "2", "--to", "new", "--split", "test"), "--split is of a data set"),
        (("none.jsonl", "--model", "new"), "there is no cluster model in new"),
    ],
)
def test_a_wrong_call_is_refused_with_what_was_found(
    arguments: tuple[str, ...], part: str, btm: Btm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = btm("discover", *arguments)
    assert code == 2
    assert part in err


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "clusters.safetensors").unlink(),
        lambda folder: (folder / "clusters.safetensors").write_bytes(b"no tensors"),
        lambda folder: (folder / "vocabulary.json").write_text('["one word"]'),
        lambda folder: (folder / "vocabulary.json").write_text("{"),
        lambda folder: (folder / "clusters.json").write_text('{"name": "x"}'),
        lambda folder: (folder / "clusters.json").write_text('[{"name": "../../x", "words": []}]'),
        lambda folder: (folder / "clusters.json").write_text('[{"name": "x", "words": []}]'),
        lambda folder: (folder / "clusters.json").write_text('[{"name": "x"}, {"name": "x"}]'),
    ],
)
def test_a_damaged_model_is_refused(
    damage: Callable[[Path], object], model: Clusters, tmp_path: Path
) -> None:
    save_clusters(model, tmp_path)
    assert cluster_names(tmp_path) == list(model.names)
    damage(tmp_path)
    with pytest.raises(UserError, match="there is no cluster model"):
        load_clusters(tmp_path)
