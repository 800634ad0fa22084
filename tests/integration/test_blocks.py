"""Packing, taking and ordering blocks."""

from pathlib import Path

import numpy as np
import pytest

from btm_cluster.data import pieces
from btm_cluster.data.blocks import Blocks, block_order
from btm_cluster.steps.stored import documents_of, open_tokenizer
from tests.conftest import made_up_documents
from tests.integration.conftest import GrownForest
from tests.reading import packed


def expected_stream(grown: GrownForest, documents: list[str]) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of documents one after the other, each
    encoded alone and ended by end-of-text."""
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    tokens, owners = [], []
    for number, document in enumerate(documents):
        ids = [*tokenizer.encode(document), tokenizer.end_of_text]
        tokens += ids
        owners += [number] * len(ids)
    return tokens, owners


@pytest.mark.parametrize("count", [1, 3, 500])
@pytest.mark.parametrize("block_tokens", [8, 32])
def test_held_out_text_is_packed_completely_and_only_its_last_block_is_padded(
    grown: GrownForest, count: int, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_BATCH_CHARACTERS", 4096)  # the last count is of several batches
    documents = made_up_documents("harbour", count, words_per_document=7)
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    tokens, owners = packed(documents, tokenizer, block_tokens, keep_rest=True)
    stream, stream_owners = expected_stream(grown, documents)
    padding = -len(stream) % block_tokens
    assert tokens.ravel().tolist() == stream + [tokenizer.end_of_text] * padding
    assert owners.ravel().tolist() == stream_owners + [-1] * padding
    assert tokens.dtype == np.uint16


def test_training_text_drops_what_does_not_fill_a_block(grown: GrownForest) -> None:
    documents = made_up_documents("harbour", 5, words_per_document=9)
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    tokens, owners = packed(documents, tokenizer, 32, keep_rest=False)
    stream, _ = expected_stream(grown, documents)
    assert len(stream) % 32, "the documents must not fit by chance"
    assert tokens.ravel().tolist() == stream[: len(stream) // 32 * 32]
    assert (owners >= 0).all()


def test_no_documents_and_too_little_text_make_no_block(grown: GrownForest) -> None:
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    for documents, keep_rest in ([], True), ([], False), (["a"], False):
        tokens, owners = packed(documents, tokenizer, 32, keep_rest)
        assert tokens.shape == owners.shape == (0, 32)


def test_a_document_that_spells_the_end_of_text_token_does_not_end_there(grown: GrownForest) -> None:
    # Source code and web pages do. The tokenizer would turn the spelling into the token itself, and a
    # document could end, for the model, wherever its author liked.
    tokenizer = open_tokenizer(grown.driver.ledger, grown.prepared.tokenizer)
    tokens, owners = packed(["before <|endoftext|> after"], tokenizer, 8, keep_rest=True)
    real = tokens[owners >= 0]
    assert (real == tokenizer.end_of_text).nonzero()[0].tolist() == [len(real) - 1]
    assert tokenizer.decode(real[:-1]) == "before <|endoftext|> after"


def test_the_stored_blocks_are_the_texts_documents_in_their_order(grown: GrownForest) -> None:
    ledger, text = grown.driver.ledger, grown.text("kitchen")
    for split in ("train", "development", "test"):
        (ref,) = text.tokens[split]
        stored = np.load(ledger.open_file(ledger.get(ref), "tokens.npy")).ravel().tolist()
        stream, _ = expected_stream(grown, list(documents_of(ledger, text.identity, split)))
        shorter = min(len(stored), len(stream))
        assert stored[:shorter] == stream[:shorter]
        assert len(stored) <= len(stream) if split == "train" else len(stored) >= len(stream)


def test_blocks_of_several_files_are_one_array(tmp_path: Path) -> None:
    shards = [np.arange(n * 4, dtype=np.uint16).reshape(n, 4) + 100 * i for i, n in enumerate((3, 0, 1, 5))]
    files = [tmp_path / f"{i}.npy" for i in range(4)]
    for file, shard in zip(files, shards, strict=True):
        np.save(file, shard)
    blocks, whole = Blocks(files), np.concatenate(shards)
    assert len(blocks) == 9
    for indices in ([0], [8], [2, 3], [8, 0, 3, 3, 4], list(range(9))):
        taken = blocks.take(np.array(indices))
        assert taken.dtype == np.int64
        np.testing.assert_array_equal(taken, whole[indices])


def test_each_epoch_takes_every_block_once_in_a_fresh_order() -> None:
    epochs = block_order(3, "law", blocks=50, first=0, count=150).reshape(3, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("step", [1, 7, 50, 64])
def test_the_order_is_a_pure_function_of_the_position_however_it_is_cut(step: int) -> None:
    whole = block_order(0, "law", blocks=50, first=0, count=200)
    for first in range(0, 200, step):
        part = block_order(0, "law", 50, first, min(step, 200 - first))
        np.testing.assert_array_equal(part, whole[first : first + step])


def test_the_order_depends_on_the_seed_and_the_text() -> None:
    orders = {tuple(block_order(seed, text, 50, 0, 50)) for seed in (0, 1) for text in ("law", "code")}
    assert len(orders) == 4


def test_the_order_is_the_one_that_stored_forests_were_trained_in() -> None:
    # Written down, since a training that an older version began must go on in the order in which it began.
    assert block_order(0, "law", 10, 0, 20).tolist() == [
        5,
        2,
        8,
        0,
        7,
        6,
        1,
        9,
        4,
        3,
        6,
        7,
        8,
        2,
        0,
        9,
        1,
        3,
        5,
        4,
    ]


def test_a_text_with_a_single_block_gives_it_for_ever() -> None:
    assert block_order(0, "law", blocks=1, first=5, count=4).tolist() == [0, 0, 0, 0]
