"""Data sets that `datasets` has saved or cached, and what is said where one cannot be read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.data.data_sets import pinned
from btm_cluster.data.documents import BadDocument
from btm_cluster.data.sources import Document, fingerprint, read_documents
from btm_cluster.errors import TextError
from btm_cluster.plan import DatasetPlan, ReadingPlan, TextPlan
from tests.reading import reasons, texts

DOCUMENTS = ["first", "second\nwith a line", "thïrd 😀"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PYTHON = ("load_dataset", "load_from_disk", "(", "`datasets.", "pip install", "trust_remote_code")


def source_of(**fields: Any) -> TextPlan:
    return TextPlan(name="a", dataset=DatasetPlan(**fields))


def read(source: TextPlan, **reading: Any) -> list[Document | BadDocument]:
    return list(read_documents(pinned(source, fingerprint(source)), ReadingPlan(**reading)))


def refusal(source: TextPlan) -> TextError:
    with pytest.raises(TextError) as caught:
        read(source)
    assert not [word for word in PYTHON if word in caught.value.found + caught.value.remedy]
    return caught.value


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As `save_to_disk` leaves it, with an index of rows, a format and several files."""
    import datasets

    made = datasets.Dataset.from_dict({"n": [0, 1, 2, 3], "text": ["no", *DOCUMENTS]}).select([1, 2, 3])
    made.with_format("numpy").save_to_disk(tmp_path / "one", num_shards=2)
    return tmp_path / "one"


def test_a_saved_data_set_is_read(saved: Path) -> None:
    source = source_of(name=str(saved))
    before = fingerprint(source)
    assert texts(read(source)) == DOCUMENTS
    assert len(reasons(read(source, longest_document_characters=5))) == 2
    assert fingerprint(source) == before
    assert set(reasons(list(read_documents(source.model_copy(update={"field": "n"}), ReadingPlan())))) == {
        "a row without text in the field 'n'"
    }
    assert len(reasons(list(read_documents(source.model_copy(update={"field": "x"}), ReadingPlan())))) == 3


def test_a_saved_data_set_of_several_splits_is_read_without_what_was_cached_beside_it(tmp_path: Path) -> None:
    import datasets

    parts = {"train": DOCUMENTS[:2], "dev": DOCUMENTS[2:]}
    datasets.DatasetDict({n: datasets.Dataset.from_dict({"text": p}) for n, p in parts.items()}).save_to_disk(
        tmp_path
    )
    loaded = datasets.load_from_disk(tmp_path / "train")
    loaded.map(lambda row: {"text": row["text"].upper()})
    assert [path for path in (tmp_path / "train").iterdir() if path.name.startswith("cache-")]
    items = read(source_of(name=str(tmp_path), development_split="dev"))
    assert [(item.text, item.split) for item in items if isinstance(item, Document)] == [
        (DOCUMENTS[0], None),
        (DOCUMENTS[1], None),
        (DOCUMENTS[2], "development"),
    ]
    assert "train, dev" in refusal(source_of(name=str(tmp_path), split="validation")).found


def test_what_a_saved_data_set_cannot_have_is_refused_in_the_words_of_a_plan(saved: Path) -> None:
    for fields in ({"split": "test"}, {"configuration": "en"}, {"revision": COMMIT}, {"test_split": "test"}):
        refusal(source_of(name=str(saved), **fields))
    (saved / "state.json").write_text("{}")
    refusal(source_of(name=str(saved)))
    (saved / "state.json").write_text(
        json.dumps({"_split": None, "_data_files": [{"filename": "gone.arrow"}]})
    )
    assert "gone.arrow" in refusal(source_of(name=str(saved))).found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that cannot reach the hub, whose cache has a data set of it."""
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "src").mkdir()
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(tmp_path / "src" / "train.parquet")
    datasets.load_dataset(str(tmp_path / "src"), split="train", cache_dir=str(tmp_path / "made"))
    made = next((tmp_path / "made").rglob("dataset_info.json")).parent
    cached = tmp_path / "cache" / "someone___tales" / "default" / "0.0.0" / COMMIT
    cached.mkdir(parents=True)
    shutil.copy(made / "src-train.arrow", cached / "tales-train.arrow")
    about = (
        (made / "dataset_info.json").read_text().replace('"dataset_name": "src"', '"dataset_name": "tales"')
    )
    (cached / "dataset_info.json").write_text(about)
    return cached


@pytest.mark.usefixtures("cache")
def test_a_cached_data_set_is_read_without_the_hub_and_its_commit_is_found() -> None:
    named, unnamed = source_of(name="someone/tales", revision=COMMIT), source_of(name="someone/tales")
    assert fingerprint(unnamed)["revision"] == COMMIT
    assert texts(read(named)) == texts(read(unnamed)) == DOCUMENTS


@pytest.mark.usefixtures("cache")
def test_another_commit_than_the_cached_one_is_not_passed_off_as_that_of_the_plan() -> None:
    error = refusal(source_of(name="someone/tales", revision="f" * 40))
    assert COMMIT in error.found
    assert COMMIT in error.remedy


def test_several_cached_configurations_are_named_without_a_call_of_python(cache: Path) -> None:
    other = cache.parents[1].parent / "en" / "0.0.0" / COMMIT
    shutil.copytree(cache, other)
    about = (other / "dataset_info.json").read_text()
    (other / "dataset_info.json").write_text(about.replace('"config_name": "default"', '"config_name": "en"'))
    assert "en" in refusal(source_of(name="someone/tales", revision=COMMIT)).found
    assert texts(read(source_of(name="someone/tales", configuration="en"))) == DOCUMENTS


@pytest.mark.usefixtures("cache")
def test_a_data_set_that_is_neither_cached_nor_reachable_is_refused_by_name() -> None:
    assert "someone/else" in refusal(source_of(name="someone/else")).found


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # `datasets` leaves a file that it fails on open
def test_configurations_and_splits_are_refused_in_the_words_of_a_plan(tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"text": "a"}\n')
    configs = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert "'en', 'de'" in refusal(source_of(name=str(tmp_path))).found
    assert texts(read(source_of(name=str(tmp_path), configuration="de"))) == ["a"]
    refusal(source_of(name=str(tmp_path), configuration="fr"))
    refusal(source_of(name=str(tmp_path), configuration="de", split="test"))
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    refusal(source_of(name=str(tmp_path / f"{tmp_path.name}.py")))
