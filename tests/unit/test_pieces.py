"""Documents encoded by pieces have the ids that their tokenizer gives them whole."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from btm_cluster.data import pieces
from btm_cluster.data.pieces import DocumentEncoder
from tests.conftest import made_up_documents

DOCUMENTS = [
    *made_up_documents("kitchen", 60),
    "don't we'll I'VE 1234 x_1 = f(a, b)\n\n    é naïve Å ≠ 你好\r\n",
] * 2
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_WITH_CONTRACTIONS = r"\p{L}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
CHARACTERS = "".join(map(chr, range(128))) + "éÅ\u0338\u0301\u212a\u00a0\u2028\u3000\ufeff你ſ²ⅷ🙂\U0001d400"


def trained(pre_tokenizer: Any, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Tokenizer:
    """A BPE of 500 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(DOCUMENTS, trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = True
    return tokenizer


def words(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUT = {
    "GPT-2": lambda: trained(BYTE_LEVEL),
    "Llama 3": lambda: trained(words(WORDS % "{1,3}")),
    "Qwen 2": lambda: trained(words(WORDS % ""), normalizers.NFC(), (AddedToken("<a_b>", normalized=False),)),
    "an added token": lambda: trained(BYTE_LEVEL, None, (AddedToken("a b", lstrip=True, rstrip=True),)),
    "thousands of added tokens": lambda: trained(
        BYTE_LEVEL, None, tuple(AddedToken(f"<{name}{n}>") for n in range(1000) for name in ("a_b", "K b"))
    ),
    "special tokens in text": lambda: with_special_tokens(trained(BYTE_LEVEL)),
}
WHOLE = {
    "contractions with their words": lambda: trained(words(WORDS_WITH_CONTRACTIONS)),
    "a space before each text": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words": lambda: trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "another normalizer": lambda: trained(BYTE_LEVEL, normalizers.Prepend("_")),
    "an added token after NFC": lambda: trained(
        BYTE_LEVEL, normalizers.NFC(), (AddedToken("K b", normalized=True),)
    ),
}


def with_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = False
    return tokenizer


def whole(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    return [tokenizer.encode(document, add_special_tokens=False).ids for document in documents]


def by_pieces(encoder: DocumentEncoder, documents: list[str]) -> list[list[int]]:
    return list(map(list, encoder.encode(documents)))


@pytest.fixture(scope="module", params=[*CUT.items(), *WHOLE.items()], ids=[*CUT, *WHOLE])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    make: Callable[[], Tokenizer] = request.param[1]
    return make()


def test_every_character_at_a_seam_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    alphabet = [chr(code) for code in (*range(0x400), *range(0x2000, 0x2070))] + list(CHARACTERS)
    documents = [f"a{c} a {c}b'{c}'s{c}1 \n{c}Zc{c}{c}K b<a_b>{c}a b{c}<|end|>" for c in alphabet]
    assert by_pieces(DocumentEncoder(tokenizer), documents) == whole(tokenizer, documents)


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(
        st.text(st.sampled_from(CHARACTERS + "aaa bbb ''' \n\n\n   "), max_size=60), max_size=6
    )
)
def test_any_documents_have_the_ids_of_the_whole(tokenizer: Tokenizer, documents: list[str]) -> None:
    assert by_pieces(DocumentEncoder(tokenizer), documents) == whole(tokenizer, documents)


class Recorder:
    """A tokenizer that notes what it was asked to encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.asked += texts
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("make", CUT.values(), ids=CUT)
def test_a_word_is_encoded_once(make: Callable[[], Tokenizer]) -> None:
    recorder = Recorder(make())
    encoder = DocumentEncoder(recorder)
    by_pieces(encoder, ["a cat, a dog", "one cat"])
    by_pieces(encoder, ["one dog"])
    assert len(recorder.asked) == len(set(recorder.asked))
    assert set(recorder.asked) - {""} == {"a", " cat", ", a", " dog", "one"}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_a_tokenizer_that_may_not_cut_there_is_given_whole_documents(make: Callable[[], Tokenizer]) -> None:
    recorder = Recorder(make())
    by_pieces(DocumentEncoder(recorder), ["a cat", "a dog"])
    assert sorted(recorder.asked) == ["a cat", "a dog"]


def test_pieces_are_forgotten_beyond_a_number_of_characters_by_iterators_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 300)
    monkeypatch.setattr(pieces, "_KNOWN_CHARACTERS", 500)
    recorder = Recorder(trained(BYTE_LEVEL))
    encoder = DocumentEncoder(recorder)

    def alternating(documents: list[str]) -> Iterator[list[int]]:
        return map(
            list,
            chain.from_iterable(zip(encoder.encode(documents), encoder.encode(documents[::-1]), strict=True)),
        )

    expected = whole(recorder, DOCUMENTS)
    assert list(alternating(DOCUMENTS)) == list(
        chain.from_iterable(zip(expected, expected[::-1], strict=True))
    )
    assert len(recorder.asked) > len(set(recorder.asked)), "some were forgotten"
