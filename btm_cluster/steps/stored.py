"""Stored artifacts as the values that steps work with: documents,
tokenizers, token blocks, configurations, weights and models."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btm_cluster.data.blocks import MARKS_FILE, PADDING_DOCUMENT, READ, Blocks
from btm_cluster.data.tokenizer import TOKENIZER_FILES, TextTokenizer, load_tokenizer
from btm_cluster.errors import MissingError
from btm_cluster.language_model.adapter_files import ADAPTER_CONFIG
from btm_cluster.ledger import Artifact, Ledger, Ref, artifact_key
from btm_cluster.storage.scratch import scratch_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from btm_cluster.data.documents import Document
    from btm_cluster.language_model.stored_weights import StoredWeights
    from btm_cluster.language_model.training_spec import TextBlocks
    from btm_cluster.requests import TrainingText


def documents_of(ledger: Ledger, text: str, split: str) -> Iterator[str]:
    """The documents of one split of a stored text, streaming, in hash order."""
    return (document.text for document in whole_documents_of(ledger, text, split))


def whole_documents_of(ledger: Ledger, text: str, split: str) -> "Iterator[Document]":
    """The same, conversations with their messages."""
    from btm_cluster.data.shards import read_shard  # pyarrow, for which models have no use

    artifact = ledger.get(Ref("text", text))
    for shard in artifact.facts["splits"][split]["shards"]:
        yield from read_shard(ledger.open_file(artifact, shard))


def count_documents(ledger: Ledger, text: str, split: str) -> int:
    """How many documents a split of a stored text has."""
    return int(ledger.get(Ref("text", text)).facts["splits"][split]["documents"])


def open_tokenizer(ledger: Ledger, ref: Ref) -> TextTokenizer:
    """A stored tokenizer."""
    artifact = ledger.get(ref)
    files = {name: ledger.open_file(artifact, name) for name in TOKENIZER_FILES}
    return load_tokenizer(files, artifact.facts.get("first_token"))


def open_transformers_tokenizer(ledger: Ledger, ref: Ref, block_tokens: int) -> "PreTrainedTokenizerFast":
    """A stored tokenizer with all that came with it, as transformers opens it."""
    from transformers import AutoTokenizer

    artifact = ledger.get(ref)
    with scratch_folder() as folder:
        for blob in artifact.blobs:
            shutil.copyfile(ledger.open_file(artifact, blob.name), folder / blob.name)
        opened: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            str(folder), model_max_length=block_tokens
        )
    return opened


def first_token_of(ledger: Ledger, tokens: Sequence[Ref]) -> int:
    """The token that models read before these token blocks."""
    (tokenizer,) = ledger.get(tokens[0]).inputs["tokenizer"]
    known = ledger.get(tokenizer).facts.get("first_token")
    return open_tokenizer(ledger, tokenizer).first_token if known is None else int(known)


def open_blocks(ledger: Ledger, text: "TrainingText") -> "TextBlocks":
    """A training text's blocks, memory-mapped."""
    from btm_cluster.language_model.training_spec import TextBlocks

    blocks, marks = _marked(ledger, text.tokens, text.first_blocks)
    return TextBlocks(text.name, blocks, marks)


def open_held_out(
    ledger: Ledger, tokens: Sequence[Ref], first_blocks: int, with_read_alone: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The first blocks of a held-out split: tokens, int64 [n, block_tokens], and which of them are predicted,
    bool; `with_read_alone`, which are no padding."""
    blocks, marks = _marked(ledger, tokens, first_blocks)
    rows = np.arange(len(blocks))
    if not len(rows):
        return np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0), dtype=np.bool_)
    if marks is not None and not with_read_alone:
        return blocks.take(rows), marks.take(rows) != READ
    documents = Blocks(_files(ledger, tokens, "documents.npy"), first_blocks)
    return blocks.take(rows), documents.take(rows) != PADDING_DOCUMENT


def _marked(ledger: Ledger, tokens: Sequence[Ref], first_blocks: int | None) -> tuple[Blocks, Blocks | None]:
    blocks = Blocks(_files(ledger, tokens, "tokens.npy"), first_blocks)
    if not tokens or not ledger.get(tokens[0]).has(MARKS_FILE):
        return blocks, None
    return blocks, Blocks(_files(ledger, tokens, MARKS_FILE), first_blocks)


def _files(ledger: Ledger, artifacts: Sequence[Ref], name: str) -> list[Path]:
    return [ledger.open_file(ledger.get(ref), name) for ref in artifacts]


def open_config(ledger: Ledger, model: Artifact) -> dict[str, Any]:
    """A stored model's configuration."""
    return dict(json.loads(ledger.open_file(model, "config.json").read_text(encoding="utf-8")))


def open_stored(ledger: Ledger, model: Artifact) -> "StoredWeights":
    """The tensors that a stored model, or a training checkpoint, itself holds: all, or what changed of its base.

    None is read yet.

    Raises:
        MissingError: it has no weights, or an index that names a file which it has not.
    """
    from btm_cluster.language_model.stored_weights import TensorFiles, open_files
    from btm_cluster.language_model.tensor_files import INDEX

    def locate(name: str) -> Path:
        if not model.has(name):
            raise MissingError(
                f"{model.kind} {model.identity[:12]} lacks {name}, which holds weights",
                found=", ".join(blob.name for blob in model.blobs),
                remedy="delete its manifest and run the plan again, which makes it anew",
            )
        return ledger.open_file(model, name)

    if model.is_delta:
        return TensorFiles([locate(_file_of_delta(model))])
    return open_files(locate, model.has(INDEX))


def open_streamed(ledger: Ledger, model: Artifact, pool: Executor, ahead: bool) -> "StoredWeights":
    """A stored model's weights, to be read once, in order, without a copy of their files on this node.

    From a bucket one chunk of 8 MiB is in memory, and with `ahead` the next one.
    Of a model that holds what changed of its base, they are opened as `open_weights` does.
    """
    from btm_cluster.language_model.stored_weights import shards_of
    from btm_cluster.language_model.streamed_weights import StreamedWeights
    from btm_cluster.language_model.tensor_files import INDEX, WEIGHTS

    if model.is_delta:
        return open_weights(ledger, model)
    names = shards_of(ledger.open_file(model, INDEX)) if model.has(INDEX) else [WEIGHTS]
    return StreamedWeights([ledger.stream(model, name, pool, ahead) for name in names], str(model.ref))


def open_weights(ledger: Ledger, model: Artifact) -> "StoredWeights":
    """A stored model's weights: of one that holds what changed of its base, those of the whole model that it is.

    No tensor is read yet.

    Raises:
        MissingError: its base is gone.
        IncompatibleError: its base is another model.
    """
    stored = open_stored(ledger, model)
    if not model.is_delta:
        return stored
    from btm_cluster.language_model.delta_weights import ChangedWeights, LoraWeights

    base = open_weights(ledger, base_of(ledger, model))
    if model.facts["trains"] != "lora":
        return ChangedWeights(base, stored)
    config = open_adapter_config(ledger, model)
    return LoraWeights(base, stored, config["lora_alpha"] / config["r"], config["fan_in_fan_out"])


def base_of(ledger: Ledger, delta: Artifact) -> Artifact:
    """The model of which `delta` holds what changed.

    Raises:
        MissingError: it was purged, or the store has lost it.
    """
    (base,) = delta.inputs["start"]
    found = ledger.find(base)
    if found is None:
        is_purged = bool(ledger.tombstones.purged_among([base]))
        raise MissingError(
            f"{delta.kind} {delta.identity[:12]} holds only what changed of its base, {base}",
            found=f"the base {'was purged' if is_purged else 'is not in the store'}",
            expected=artifact_key(base),
            remedy="take its domain out of the forest (`btm forest remove`), and train it anew by another name"
            if is_purged
            else "restore the base from a backup",
        )
    return found


def open_adapter_config(ledger: Ledger, model: Artifact) -> dict[str, Any]:
    """PEFT's configuration of a stored adapter."""
    return dict(json.loads(ledger.open_file(model, ADAPTER_CONFIG).read_text(encoding="utf-8")))


def open_model(
    ledger: Ledger,
    model: Ref | Artifact,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
) -> "PreTrainedModel":
    """A stored model; in float32 where no `dtype` is named."""
    import torch

    from btm_cluster.language_model.model import load_model

    found = ledger.get(model) if isinstance(model, Ref) else model
    weights = open_weights(ledger, found)
    return load_model(open_config(ledger, found), weights, device, dtype or torch.float32)


def weights_sha256(model: Artifact) -> str:
    """SHA-256 of a stored model's weights, or of what it holds of them: of their file, or of the list of SHA-256 of
    index and shards."""
    from btm_cluster.language_model.stored_weights import holds_whole_weights

    if model.is_delta:
        return model.blob(_file_of_delta(model)).sha256
    hashes = [
        blob.sha256 for blob in sorted(model.blobs, key=attrgetter("name")) if holds_whole_weights(blob.name)
    ]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _file_of_delta(model: Artifact) -> str:
    from btm_cluster.language_model.deltas import FILES

    return FILES[model.facts["trains"]]
