"""Turns a shard of a text into token blocks."""

import numpy as np

from btm_cluster.data.blocks import MARKS_FILE, READ, pack_blocks
from btm_cluster.data.chat_tokens import tokenised_documents
from btm_cluster.data.shards import read_shard
from btm_cluster.data.tokenizer import TOKENIZER_FILES, TextTokenizer
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import Tokenize
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.stored import open_tokenizer
from btm_cluster.storage.scratch import scratch_folder

_opened: dict[tuple[object, ...], TextTokenizer] = {}
"""The tokenizer of this process's last shard, by its content, with the pieces of text that it knows."""


def tokenize(request: Tokenize, ledger: Ledger, control: Control) -> Artifact:
    """Packs the shard's documents into blocks.

    Held-out text keeps its last, partly filled block, each token's document, and each document's bytes. Marks
    are kept where a token is read alone.
    """
    text = ledger.get(Ref("text", request.text))
    tokenizer = _open_once(ledger, request.tokenizer)
    split = text.facts["splits"][request.split]
    total = split["documents"] if len(split["shards"]) == 1 else 0  # facts are those of a whole split
    counter = Counter(control, request.shown, "tokenising", total, "documents")
    held_out = request.split != "train"
    shard = counter.over(read_shard(ledger.open_file(text, request.shard)))
    documents = tokenised_documents(shard, tokenizer, request.template)
    keep_marks = request.template is not None  # of all shards of a text, or of none
    packed = pack_blocks(documents, tokenizer, request.block_tokens, held_out, keep_marks)
    arrays = {"tokens.npy": packed.tokens}
    facts = {"blocks": len(packed.tokens), "tokens": int((packed.documents >= 0).sum())}
    if held_out:
        arrays |= {"documents.npy": packed.documents, "bytes.npy": packed.bytes_of_documents}
    if packed.marks is not None:
        arrays[MARKS_FILE] = packed.marks
        facts["predicted_tokens"] = int((packed.marks != READ).sum())
    with scratch_folder() as folder:
        for name, array in arrays.items():
            np.save(folder / name, array)
        return ledger.commit(request, {name: folder / name for name in arrays}, facts)


def _open_once(ledger: Ledger, ref: Ref) -> TextTokenizer:
    artifact = ledger.get(ref)
    content = (*(artifact.blob(name).sha256 for name in TOKENIZER_FILES), artifact.facts.get("first_token"))
    opened = _opened.get(content)
    if opened is None:
        opened = open_tokenizer(ledger, ref)
        _opened.clear()
        _opened[content] = opened
    return opened
