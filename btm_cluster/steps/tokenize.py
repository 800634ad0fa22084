"""Turns a shard of a text into token blocks."""

import numpy as np

from btm_cluster.data.blocks import pack_blocks
from btm_cluster.data.corpus import read_shard
from btm_cluster.ledger import Artifact, Ledger, Ref
from btm_cluster.requests import Tokenize
from btm_cluster.requests.progress import Control, Counter
from btm_cluster.steps.stored import open_tokenizer
from btm_cluster.storage.scratch import scratch_folder


def tokenize(request: Tokenize, ledger: Ledger, control: Control) -> Artifact:
    """Packs the shard's documents into blocks; held-out text keeps its last, partly
    filled block and each token's document."""
    text = ledger.get(Ref("text", request.text))
    tokenizer = open_tokenizer(ledger, request.tokenizer)
    split = text.facts["splits"][request.split]
    total = split["documents"] if len(split["shards"]) == 1 else 0  # of a single shard nothing is counted
    counter = Counter(control, request.shown, "tokenising", total, "documents")
    documents = counter.over(read_shard(ledger.open_file(text, request.shard)))
    held_out = request.split != "train"
    tokens, owners = pack_blocks(documents, tokenizer, request.block_tokens, keep_rest=held_out)
    with scratch_folder() as folder:
        files = {"tokens.npy": folder / "tokens.npy"}
        np.save(files["tokens.npy"], tokens)
        if held_out:
            files["documents.npy"] = folder / "documents.npy"
            np.save(files["documents.npy"], owners)
        facts = {"blocks": len(tokens), "tokens": int((owners >= 0).sum())}
        return ledger.commit(request, files, facts)
