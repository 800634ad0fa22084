"""Tokenizers: trained, imported, stored; what they refuse."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from btm_cluster.data.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILES,
    TextTokenizer,
    compare_with_transformers,
    import_tokenizer,
    load_tokenizer,
    open_pretrained_tokenizer,
)
from btm_cluster.data.tokenizer_training import take_characters, train_tokenizer
from btm_cluster.errors import TextError, UserError
from btm_cluster.language_model.pretrained import pretrained_tokenizer_hash
from tests.conftest import made_up_documents
from tests.reading import packed

DOCUMENTS = [text for name in ("kitchen", "harbour") for text in made_up_documents(name, 150)]


def load(folder: Path) -> TextTokenizer:
    return load_tokenizer({name: folder / name for name in TOKENIZER_FILES})


def bring(source: Path, folder: Path) -> TextTokenizer:
    """Imports the tokenizer in `source` to `folder`, and opens it there."""
    opened = open_pretrained_tokenizer(source)
    files = import_tokenizer(source, opened, folder)
    return load_tokenizer(files, opened.first_token)


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
    tokens, _ = packed([text], tokenizer, 512, keep_rest=True)
    ids = tokens[0][: tokens[0].tolist().index(tokenizer.end_of_text)].tolist()
    assert tokenizer.decode(ids) == text


def test_a_document_that_spells_the_end_of_text_does_not_end_there(trained: Path) -> None:
    """Otherwise anybody who writes <|endoftext|> in a document cuts it in two for the model."""
    tokenizer = load(trained)
    document = f"one {END_OF_TEXT} two"
    assert tokenizer.end_of_text not in tokenizer.encode(document)
    tokens, owners = packed([document], tokenizer, 64, keep_rest=True)
    assert (tokens[owners >= 0] == tokenizer.end_of_text).sum() == 1


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
    one, other = load(trained), bring(trained, tmp_path)
    assert other.vocabulary == 400
    assert [one.encode(d) for d in DOCUMENTS[:20]] == [other.encode(d) for d in DOCUMENTS[:20]]
    assert one.end_of_text == other.end_of_text


def test_an_end_of_text_token_with_attributes_is_imported(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "old")
    token = {
        "content": END_OF_TEXT,
        "__type": "AddedToken",
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": token | {"single_word": False}}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = bring(tmp_path / "old", tmp_path / "new")
    assert tokenizer.name(tokenizer.end_of_text) == END_OF_TEXT


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
        bring(tmp_path, tmp_path / "out")
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "evil")
    config = {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
        "eos_token": END_OF_TEXT,
    }
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        bring(tmp_path / "evil", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_characters_are_taken_from_the_first_documents() -> None:
    assert list(take_characters(["abc", "def", "ghi"], 4)) == ["abc", "def"]
    assert list(take_characters(["abc"], 100)) == ["abc"]


def save(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """A tokenizer's folder as a publisher leaves it."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def test_settings_stored_beside_a_vocabulary_change_no_ids(trained: Path, tmp_path: Path) -> None:
    plain = Tokenizer.from_file(str(trained / "tokenizer.json"))
    expected = [plain.encode(document, add_special_tokens=False).ids for document in DOCUMENTS[:20]]
    settings = Tokenizer.from_file(str(trained / "tokenizer.json"))
    settings.enable_truncation(max_length=8)
    settings.enable_padding(length=64, pad_token=END_OF_TEXT)
    save(tmp_path / "settings", settings)
    stored = json.loads((tmp_path / "settings" / "tokenizer.json").read_text())
    stored["model"]["dropout"] = 0.5
    (tmp_path / "settings" / "tokenizer.json").write_text(json.dumps(stored))
    imported = bring(tmp_path / "settings", tmp_path / "imported")
    assert list(map(list, imported.encode_all(DOCUMENTS[:20]))) == expected
    assert [imported.encode(document) for document in DOCUMENTS[:20]] == expected
    same = (tmp_path / "imported" / "tokenizer.json").read_bytes()
    assert same == (tmp_path / "settings" / "tokenizer.json").read_bytes(), "byte for byte"


def test_a_tokenizer_for_short_blocks_is_compared_without_a_warning_of_another_library(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text it is compared on is longer than the block: each `btm merge` of
    small blocks spoke of indexing errors."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    source = save(tmp_path / "source", tokenizer, model_max_length=32)
    compare_with_transformers(source, open_pretrained_tokenizer(source))
    assert not caplog.text


ODD = ["ship   12345\n\n1987: 20 tons", "it's x_1 != y", "\t\tif  a:\r\n  b"]


@pytest.mark.parametrize("name", ["GPT2TokenizerFast", "Qwen2Tokenizer", "GPTNeoXTokenizerFast", None])
def test_ids_are_those_of_the_file_though_transformers_would_build_the_named_class_anew(
    name: str | None, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Tokenizer.from_file(str(trained / "tokenizer.json"))
    words = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+"), "isolated")
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    own.train_from_iterator(
        [*DOCUMENTS, *ODD * 20], trainers.BpeTrainer(vocab_size=500, special_tokens=[END_OF_TEXT])
    )
    source = save(tmp_path / "source", own, **({"tokenizer_class": name} if name else {}))
    if name is None:  # the class of a model beside it, then
        (source / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    expected = [own.encode(document, add_special_tokens=False).ids for document in [*ODD, *DOCUMENTS[:5]]]
    imported = bring(source, tmp_path / "imported")
    assert [imported.encode(document) for document in [*ODD, *DOCUMENTS[:5]]] == expected
    assert "other token ids" in caplog.text
    (tmp_path / "imported" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for_others = AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert [
        for_others.encode(document, add_special_tokens=False) for document in [*ODD, *DOCUMENTS[:5]]
    ] == expected
    caplog.clear()
    compare_with_transformers(tmp_path / "imported", imported)
    assert not caplog.text
    # Whatever class is named.
    (tmp_path / "imported" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    compare_with_transformers(tmp_path / "imported", imported)
    assert "PreTrainedTokenizerFast" in caplog.text


def test_every_chat_template_that_came_with_a_tokenizer_stays(trained: Path, tmp_path: Path) -> None:
    """Those in a folder of their own were dropped."""
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    before = pretrained_tokenizer_hash(source)
    (source / "chat_template.jinja").write_text("one")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert AutoTokenizer.from_pretrained(source).chat_template == {"default": "one", "tool_use": "other"}
    assert pretrained_tokenizer_hash(source) != before
    bring(source, tmp_path / "imported")
    assert AutoTokenizer.from_pretrained(tmp_path / "imported").chat_template == {
        "default": "one",
        "tool_use": "other",
    }


def beginning(trained: Path, single: str = "<bos> $A") -> Tokenizer:
    """A tokenizer that puts tokens before a text."""
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokenizer.add_special_tokens(["<bos>", "<sop>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<sop>") if token in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


def test_what_is_read_first_is_the_tokenizers_own_first_token_or_else_end_of_text(
    trained: Path, tmp_path: Path
) -> None:
    bos = beginning(trained).token_to_id("<bos>")
    assert open_pretrained_tokenizer(trained).first_token == load(trained).end_of_text
    source = save(tmp_path / "begins", beginning(trained), bos_token="<bos>")
    assert bring(source, tmp_path / "imported").first_token == bos
    assert open_pretrained_tokenizer(source, END_OF_TEXT).first_token == load(trained).end_of_text, (
        "as a plan says"
    )
    with pytest.raises(UserError, match="no token '<start>'"):
        open_pretrained_tokenizer(source, "<start>")


def test_several_first_tokens_are_refused_unless_the_plan_names_one(trained: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "two", beginning(trained, "<bos> <sop> $A"))
    with pytest.raises(UserError, match="does not say which token a model reads first") as caught:
        open_pretrained_tokenizer(source)
    assert "tokenizer.first_token" in caught.value.remedy
    assert open_pretrained_tokenizer(source, "<sop>").first_token == beginning(trained).token_to_id("<sop>")


def test_ids_with_gaps_between_them_fit_the_blocks_that_hold_them(trained: Path, tmp_path: Path) -> None:
    """The number of tokens said 16 bits, and the largest id did not fit them."""
    stored = json.loads((trained / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 70_000
    shutil.copytree(trained, tmp_path / "gaps")
    (tmp_path / "gaps" / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = bring(tmp_path / "gaps", tmp_path / "imported")
    assert tokenizer.vocabulary == 70_001
    tokens, owners = packed(DOCUMENTS[:50], tokenizer, 32, keep_rest=True)
    assert tokens.max() == 70_000
    assert tokenizer.decode(tokens[owners == 0][:-1].tolist()) == DOCUMENTS[0]


def test_a_continuation_keeps_the_space_at_its_seam(tmp_path: Path) -> None:
    """Tokenizers of Llama's kind drop the space before the first token that they decode."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        DOCUMENTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", END_OF_TEXT])
    )
    imported = bring(save(tmp_path / "source", tokenizer), tmp_path / "imported")
    text = DOCUMENTS[0]
    ids, seam = imported.encode(text), 9
    before = imported.decode(ids[:seam])
    assert before + imported.decode_continuation(ids[:seam], ids[seam:]) == text
    assert imported.decode_continuation([], ids) == text


def test_a_continuation_keeps_the_other_half_of_a_character(trained: Path) -> None:
    tokenizer = load(trained)
    ids = tokenizer.encode("née 🙂")
    for seam in range(len(ids)):
        assert tokenizer.decode_continuation(ids[:seam], ids[seam:])
    whole = tokenizer.decode(ids[:2]) + tokenizer.decode_continuation(ids[:2], ids[2:])
    assert "🙂" in whole
