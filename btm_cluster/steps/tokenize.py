"""Turns a shard of a text into token blocks."""

from collections.abc import Iterable, Iterator

import numpy as np

from btm_cluster.data.blocks import pack_blocks
from btm_cluster.data.corpus import read_shard
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import Tokenize
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.stored import open_tokenizer
from btm_cluster.storage.scratch import scratch_folder


def tokenize(request: Tokenize, ledger: Ledger, control: Control) -> Artifact:
    """Packs the shard's documents into blocks.

    Held-out text keeps its last, partly filled block, each token's document, and each document's bytes.
    """
    text = ledger.get(Ref("text", request.text))
    tokenizer = open_tokenizer(ledger, request.tokenizer)
    split = text.facts["splits"][request.split]
    total = split["documents"] if len(split["shards"]) == 1 else 0  # facts are those of a whole split
    counter = Counter(control, request.shown, "tokenising", total, "documents")
    held_out = request.split != "train"
    bytes_of_documents: list[int] = []
    shard = counter.over(read_shard(ledger.open_file(text, request.shard)))
    documents = _counted(shard, bytes_of_documents)
    tokens, owners = pack_blocks(documents, tokenizer, request.block_tokens, keep_rest=held_out)
    with scratch_folder() as folder:
        files = {"tokens.npy": folder / "tokens.npy"}
        np.save(files["tokens.npy"], tokens)
        if held_out:
            files |= {name: folder / name for name in ("documents.npy", "bytes.npy")}
            np.save(files["documents.npy"], owners)
            np.save(files["bytes.npy"], np.array(bytes_of_documents, dtype=np.int64))
        facts = {"blocks": len(tokens), "tokens": int((owners >= 0).sum())}
        return ledger.commit(request, files, facts)


def _counted(documents: Iterable[str], counts: list[int]) -> Iterator[str]:
    """The documents; appends the bytes of each in UTF-8 to `counts`, without an end-of-text token."""
    for document in documents:
        counts.append(len(document.encode()))
        yield document
