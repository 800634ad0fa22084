"""Tokenizers: trained, imported, stored; what they refuse."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from btm_cluster.errors import TextError, UserError
from btm_cluster.language_model.blocks import pack_blocks
from btm_cluster.language_model.pretrained import pretrained_tokenizer_hash, pretrained_vocabulary
from btm_cluster.language_model.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILES,
    import_tokenizer,
    load_tokenizer,
    take_characters,
    train_tokenizer,
)
from tests.conftest import made_up_documents

DOCUMENTS = [text for name in ("kitchen", "harbour") for text in made_up_documents(name, 150)]


def load(folder: Path) -> Any:
    return load_tokenizer({name: folder / name for name in TOKENIZER_FILES})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer of 400 tokens."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_tokenizer(DOCUMENTS, 400, folder) == 400
    return folder


def test_training_does_not_depend_on_the_order_of_documents(trained: Path, tmp_path: Path) -> None:
    for seed in range(3):
        folder = tmp_path / str(seed)
        train_tokenizer(random.Random(seed).sample(DOCUMENTS, len(DOCUMENTS)), 400, folder)
        for name in TOKENIZER_FILES:
            assert (folder / name).read_bytes() == (trained / name).read_bytes()


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
@example(text="tab\t, line\r\n, \u2028 and 😀, e\u0301, \0 and \x85")
@example(text=f"{END_OF_TEXT} is spelled here")
def test_any_text_comes_back_from_its_tokens(text: str, trained: Path) -> None:
    tokenizer = load(trained)
    tokens, _ = pack_blocks([text], tokenizer, 512, keep_rest=True)
    ids = tokens[0][: tokens[0].tolist().index(tokenizer.eos_token_id)].tolist()
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_document_that_spells_the_end_of_text_does_not_end_there(trained: Path) -> None:
    """Otherwise anybody who writes <|endoftext|> in a document cuts it in two for the model."""
    tokenizer = load(trained)
    document = f"one {END_OF_TEXT} two"
    assert tokenizer.eos_token_id not in tokenizer.encode(document)
    tokens, owners = pack_blocks([document], tokenizer, 64, keep_rest=True)
    assert (tokens[owners >= 0] == tokenizer.eos_token_id).sum() == 1


def test_long_runs_without_spaces_do_not_hold_training_up(tmp_path: Path) -> None:
    """A run of n letters took the trainer n² steps: with a million, one legal document, it did not end."""
    runs = ["a" * 1_000_000, " " * 1_000_000, "".join(random.Random(0).choices("acgt", k=1_000_000))]
    assert train_tokenizer([*DOCUMENTS, *runs], 400, tmp_path) == 400


def test_text_too_small_for_the_vocabulary_is_refused_with_the_largest_that_works(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="too small for the vocabulary") as caught:
        train_tokenizer(["a few words"], 5000, tmp_path)
    found = int(caught.value.remedy.split()[-3])
    assert train_tokenizer(["a few words"], found, tmp_path) == found


def test_an_imported_tokenizer_encodes_as_before(trained: Path, tmp_path: Path) -> None:
    assert import_tokenizer(str(trained), tmp_path) == 400 == pretrained_vocabulary(trained)
    one, other = load(trained), load(tmp_path)
    assert [one.encode(d) for d in DOCUMENTS[:20]] == [other.encode(d) for d in DOCUMENTS[:20]]
    assert one.eos_token_id == other.eos_token_id


def test_an_end_of_text_token_with_attributes_is_imported(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "old")
    token = {"content": END_OF_TEXT, "__type": "AddedToken", "lstrip": True, "rstrip": False, "normalized": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token | {"single_word": False}}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config))
    import_tokenizer(str(tmp_path / "old"), tmp_path / "new")
    assert load(tmp_path / "new").eos_token == END_OF_TEXT


def test_a_tokenizer_is_identified_by_the_content_of_its_files(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    assert pretrained_tokenizer_hash(tmp_path / "copy") == pretrained_tokenizer_hash(trained)
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert pretrained_tokenizer_hash(tmp_path / "copy") != pretrained_tokenizer_hash(trained)
    for content in (b"one", b"other"):  # a sentencepiece model has no other file
        folder = tmp_path / content.decode()
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(content)
    assert pretrained_tokenizer_hash(tmp_path / "one") != pretrained_tokenizer_hash(tmp_path / "other")


BROKEN = {
    "nothing": {},
    "an empty object": {"tokenizer.json": b"{}"},
    "no JSON": {"tokenizer.json": b"hello"},
    "binary": {"tokenizer.json": b"\xff\xfe\0"},
    "a broken configuration": {"tokenizer.json": None, "tokenizer_config.json": b"[1"},
    "no end-of-text token": {"tokenizer.json": None},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_without_a_usable_tokenizer_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    for file, content in BROKEN[name].items():
        (tmp_path / file).write_bytes((trained / file).read_bytes() if content is None else content)
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        import_tokenizer(str(tmp_path), tmp_path / "out")
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "evil")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "eos_token": END_OF_TEXT}
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        import_tokenizer(str(tmp_path / "evil"), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_characters_are_taken_from_the_first_documents() -> None:
    assert list(take_characters(["abc", "def", "ghi"], 4)) == ["abc", "def"]
    assert list(take_characters(["abc"], 100)) == ["abc"]
