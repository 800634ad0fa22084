"""Documents become a text: its identity, its splits, its shards, and what is left out."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btm_cluster.data import corpus, shards
from btm_cluster.data.corpus import SPLITS, Text, content_hash, write_text
from btm_cluster.data.shards import read_shard
from btm_cluster.data.word_windows import word_windows
from btm_cluster.errors import TextError
from btm_cluster.plan import DatasetPlan, ReadingPlan, TextPlan
from tests.conftest import made_up_documents, write_jsonl

DOCUMENTS = made_up_documents("kitchen", 300, 20)
READING = ReadingPlan(development_share=0.1, test_share=0.1)


def make(
    folder: Path,
    text: Path | str = "",
    reading: ReadingPlan = READING,
    is_target: bool = False,
    **fields: Any,
) -> Text:
    """A text made of the files that a pattern matches."""
    folder.mkdir(exist_ok=True)
    source = TextPlan(name="a", **({"text": str(text)} if text else {}), **fields)
    return write_text(source, reading, is_target, folder)


def documents(text: Text, split: str) -> list[str]:
    """The documents of a split, in the order that they are stored in."""
    return [d.text for name in text.facts["splits"][split]["shards"] for d in read_shard(text.files[name])]


def counts(text: Text) -> list[int]:
    return [text.facts["splits"][split]["documents"] for split in SPLITS]


def scatter(documents: list[str], folder: Path, seed: int) -> str:
    """Writes documents shuffled over files of all kinds and compressions;
    returns a glob that matches them."""
    rng = random.Random(seed)
    shuffled = rng.sample(documents, len(documents))
    folder.mkdir(parents=True)
    cuts = sorted(rng.choices(range(len(shuffled) + 1), k=3))
    for i, part in enumerate(np.split(np.array(shuffled, dtype=object), cuts)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        match (seed + i) % 4:
            case 0:
                (folder / f"{rng.random()}.jsonl").write_bytes(lines)
            case 1:
                (folder / f"{rng.random()}.jsonl.gz").write_bytes(gzip.compress(lines))
            case 2:
                packed = pa.Codec("zstd").compress(lines, asbytes=True)
                (folder / f"{rng.random()}.jsonl.zst").write_bytes(packed)
            case 3:
                pq.write_table(
                    pa.table({"text": pa.array(part, pa.string())}), folder / f"{rng.random()}.parquet"
                )
    return str(folder / "*")


def test_a_text_is_the_same_whatever_the_order_split_and_compression_of_its_files(tmp_path: Path) -> None:
    made = [make(tmp_path / f"out-{i}", scatter(DOCUMENTS, tmp_path / f"in-{i}", i)) for i in range(4)]
    assert len({text.identity for text in made}) == 1
    assert all(text.facts == made[0].facts for text in made)
    assert all(
        path.read_bytes() == made[0].files[name].read_bytes()
        for text in made
        for name, path in text.files.items()
    )


def test_a_text_is_another_when_one_character_of_it_is(tmp_path: Path) -> None:
    first = make(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    changed = make(tmp_path / "b", write_jsonl(tmp_path / "b.jsonl", [*DOCUMENTS[:-1], DOCUMENTS[-1] + "."]))
    shares = ReadingPlan(development_share=0.2, test_share=0.1)
    resplit = make(tmp_path / "c", tmp_path / "a.jsonl", reading=shares)
    assert len({first.identity, changed.identity, resplit.identity}) == 3


def test_every_document_stands_in_one_split_in_about_the_shares_asked_for(tmp_path: Path) -> None:
    text = make(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    assert sorted(d for split in SPLITS for d in documents(text, split)) == sorted(DOCUMENTS)
    train, development, test = counts(text)
    assert 200 < train < 270
    assert 10 < development < 60
    assert 10 < test < 60
    for split in SPLITS:
        found = documents(text, split)
        assert found == sorted(found, key=content_hash)
        facts = text.facts["splits"][split]
        assert facts["characters"] == sum(map(len, found))
        assert facts["words"] == sum(len(d.split()) for d in found)


def test_adding_documents_never_moves_the_others_to_another_split(tmp_path: Path) -> None:
    few = make(tmp_path / "few", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:200]))
    many = make(tmp_path / "many", write_jsonl(tmp_path / "b.jsonl", DOCUMENTS))
    for split in SPLITS:
        assert set(documents(few, split)) <= set(documents(many, split))


def test_documents_that_differ_in_case_and_spacing_only_are_one(tmp_path: Path) -> None:
    variants = (
        [d.upper() for d in DOCUMENTS] + [f"  {d.replace(' ', chr(10))}" for d in DOCUMENTS] + DOCUMENTS
    )
    orders = [variants, variants[::-1]]
    made = [
        make(tmp_path / f"out-{i}", write_jsonl(tmp_path / f"{i}.jsonl", v)) for i, v in enumerate(orders)
    ]
    assert made[0].identity == made[1].identity
    assert sum(counts(made[0])) == len(DOCUMENTS)
    assert made[0].facts["duplicates"] == 2 * len(DOCUMENTS)


def test_given_test_and_development_files_win_over_training_text(tmp_path: Path) -> None:
    text = make(
        tmp_path / "out",
        write_jsonl(tmp_path / "all.jsonl", DOCUMENTS),
        development=str(write_jsonl(tmp_path / "dev.jsonl", DOCUMENTS[:20])),
        test=str(write_jsonl(tmp_path / "test.jsonl", DOCUMENTS[10:30])),
    )
    assert set(documents(text, "test")) == set(DOCUMENTS[10:30])
    assert set(documents(text, "development")) == set(DOCUMENTS[:10])
    assert set(documents(text, "train")) == set(DOCUMENTS[30:])
    assert text.facts["duplicates"] == 40


def test_given_files_leave_no_share_of_the_text_for_that_split(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "dev.jsonl", made_up_documents("harbour", 5, 20))
    text = make(tmp_path / "out", write_jsonl(tmp_path / "all.jsonl", DOCUMENTS), development=str(held_out))
    assert counts(text)[1] == 5
    assert counts(text)[2] > 0


def test_a_target_is_half_development_and_half_test(tmp_path: Path) -> None:
    text = make(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), is_target=True)
    train, development, test = counts(text)
    assert train == 0
    assert 100 < development < 200
    assert 100 < test < 200


def test_a_target_of_given_test_files_is_development_text_beside_them(tmp_path: Path) -> None:
    given_test = write_jsonl(tmp_path / "test.jsonl", DOCUMENTS[:10])
    both = make(
        tmp_path / "both",
        write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[10:]),
        is_target=True,
        test=str(given_test),
    )
    assert counts(both) == [0, 290, 10]
    alone = make(tmp_path / "alone", is_target=True, test=str(given_test))
    assert counts(alone) == [0, 0, 10]


def test_a_data_set_gives_its_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", DOCUMENTS[:250])
    write_jsonl(tmp_path / "data" / "validation.jsonl", DOCUMENTS[250:280])
    write_jsonl(tmp_path / "data" / "test.jsonl", DOCUMENTS[280:])
    plan = DatasetPlan(name=str(tmp_path / "data"), development_split="validation", test_split="test")
    text = make(tmp_path / "out", dataset=plan)
    assert counts(text) == [250, 30, 20]
    same = make(tmp_path / "shared", dataset=DatasetPlan(name=str(tmp_path / "data")))
    assert same.identity == make(tmp_path / "files", tmp_path / "data" / "train.jsonl").identity


def test_shards_are_cut_by_the_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 4_000)
    monkeypatch.setattr(corpus, "_SPOOL_BUFFER_BYTES", 64)
    first = make(tmp_path / "a", scatter(DOCUMENTS, tmp_path / "in-a", 1))
    assert len(first.facts["splits"]["train"]["shards"]) > 3
    assert sorted(d for split in SPLITS for d in documents(first, split)) == sorted(DOCUMENTS)
    second = make(tmp_path / "b", scatter(DOCUMENTS, tmp_path / "in-b", 2))
    assert first.facts == second.facts
    assert {path.name for path in (tmp_path / "a").iterdir()} == set(first.files)  # no spool is left


def test_a_bad_document_refuses_the_text_and_says_how_to_skip_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(TextError, match=r"a\.jsonl:301: a line that is not JSON") as caught:
        make(tmp_path / "out", path)
    assert "bad_documents: skip" in caught.value.remedy
    assert "--bad-documents skip" in caught.value.remedy  # `btm score` has no plan to set it in


@pytest.mark.parametrize(
    ("name", "written", "mends"),
    [
        ("a.csv", b"body,n\nhello,1\n", "name the `field`"),
        ("a.jsonl", b'{"body": "hello"}\n', "name the `field`"),
        ("a.txt", "Größe".encode("latin-1"), "iconv"),
        ("a.txt", b"x" * 2_000_000, "`delimiter`"),
    ],
)
def test_a_bad_document_is_refused_with_what_mends_one_of_its_kind(
    name: str, written: bytes, mends: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(written)
    with pytest.raises(TextError) as caught:
        make(tmp_path / "out", tmp_path / name)
    assert mends in caught.value.remedy


def test_a_parquet_file_of_other_columns_is_refused_by_the_option_that_names_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["hello"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match=r"no column 'text' .*: 'body', 'id'") as caught:
        make(tmp_path / "out", tmp_path / "a.parquet")
    assert "name the `field`" in caught.value.remedy


def test_bad_and_empty_documents_are_counted_by_reason_and_change_nothing_else(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    whole = make(tmp_path / "whole", path)
    long = json.dumps({"text": "x" * 2001})
    path.write_text(
        f'not json\n{long}\n{{"text": ""}}\n{{"text": " \\n"}}\n' + path.read_text() + "[]\nnot json"
    )
    skip = READING.model_copy(update={"bad_documents": "skip", "longest_document_characters": 2000})
    text = make(tmp_path / "out", path, reading=skip)
    assert text.identity == whole.identity
    assert text.bad == {
        "a line that is not JSON in UTF-8": 2,
        "a line that is not a JSON object": 1,
        "a document longer than 2,000 characters": 1,
        "an empty document": 2,
    }


@pytest.mark.parametrize(
    ("written", "part"),
    [
        ([], "train 0, development 0, test 0; duplicates: 0; skipped: none"),
        (["", " "], "skipped: 2 × an empty document"),
        (["the same"] * 50, "train 0, development 1, test 0; duplicates: 49"),
        (["one", "two"], "has no document for"),
    ],
)
def test_a_split_without_documents_refuses_the_text_with_its_counts(
    written: list[str], part: str, tmp_path: Path
) -> None:
    with pytest.raises(TextError, match="the text of 'a' has no document for") as caught:
        make(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", written))
    assert part in str(caught.value)
    assert "give more documents" in caught.value.remedy


@pytest.mark.parametrize(
    "shares", [(1e-9, 1e-9), (0.5, 1e-9), (0.5, 0.499999999), (1e-9, 0.999999998), (0.02, 0.02)]
)
def test_a_text_of_three_documents_has_one_for_each_split_wherever_their_hashes_fall(
    shares: tuple[float, float], tmp_path: Path
) -> None:
    reading = ReadingPlan(development_share=shares[0], test_share=shares[1])
    written = ["one", "two", "three"]
    made = [
        make(tmp_path / f"out-{i}", write_jsonl(tmp_path / f"{i}.jsonl", order), reading=reading)
        for i, order in enumerate((written, written[::-1], [*written, "one", "two"]))
    ]
    assert counts(made[0]) == [1, 1, 1]
    assert len({text.identity for text in made}) == 1


def test_a_split_that_nothing_fell_to_takes_one_document_and_the_rest_stay(tmp_path: Path) -> None:
    """143 documents at 5 % once gave no test document, and the text was refused."""
    written = [f"document {i}" for i in range(300)]
    none = ReadingPlan(development_share=0.2, test_share=1e-9)
    text = make(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", written), reading=none)
    (moved,) = documents(text, "test")
    rest = write_jsonl(tmp_path / "b.jsonl", [document for document in written if document != moved])
    given = write_jsonl(tmp_path / "test.jsonl", [moved])
    assert make(tmp_path / "given", rest, reading=none, test=str(given)).identity == text.identity


def test_given_files_are_no_share_of_the_text_and_their_documents_stay_where_they_were_given(
    tmp_path: Path,
) -> None:
    test = write_jsonl(tmp_path / "test.jsonl", DOCUMENTS[:2])
    few = ReadingPlan(development_share=1e-9, test_share=0.1)
    text = make(
        tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[2:4]), reading=few, test=str(test)
    )
    assert counts(text) == [1, 1, 2]
    assert set(documents(text, "test")) == set(DOCUMENTS[:2])


@pytest.mark.parametrize("i", range(8))
def test_a_target_of_two_documents_has_one_of_each_kind_and_one_alone_is_test_text(
    i: int, tmp_path: Path
) -> None:
    pair = write_jsonl(tmp_path / "pair.jsonl", [f"one {i}", f"two {i}"])
    assert counts(make(tmp_path / "pair", pair, is_target=True)) == [0, 1, 1]
    alone = write_jsonl(tmp_path / "alone.jsonl", [f"one {i}"])
    assert counts(make(tmp_path / "alone", alone, is_target=True)) == [0, 0, 1]


def test_a_target_without_test_documents_is_refused_without_advice_for_domains(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no document for: test") as caught:
        make(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", []), is_target=True)
    assert "reading" not in caught.value.remedy


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=st.lists(st.text(max_size=30).filter(str.strip), min_size=1))
def test_whatever_characters_documents_have_they_are_stored_unchanged(
    written: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    whole = write_jsonl(folder / "test.jsonl", written)
    text = make(folder / "out", test=str(whole), is_target=True)
    assert set(documents(text, "test")) <= set(written)
    assert len(documents(text, "test")) == len({" ".join(d.casefold().split()) for d in written})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=40), st.lists(st.sampled_from("abc"), max_size=40))
def test_two_texts_share_windows_exactly_where_they_share_runs_of_words(
    one: list[str], other: list[str]
) -> None:
    def runs(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + 4]) for i in range(len(words) - 3)]

    hashes = [word_windows(" ".join(words), words=4) for words in (one, other)]
    assert [len(h) for h in hashes] == [len(runs(one)), len(runs(other))]
    expected = [run in runs(other) for run in runs(one)]
    assert np.isin(hashes[0], hashes[1]).tolist() == expected


def test_windows_see_no_difference_of_case_and_spacing() -> None:
    text = " ".join(f"Word{i}" for i in range(25))
    assert word_windows(text).tolist() == word_windows(text.lower().replace(" ", "\n  ")).tolist()
    assert word_windows(text).dtype == np.uint64
    assert len(word_windows(text)) == 6
