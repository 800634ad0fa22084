"""A model's folder as other programs open it: configuration and weights, in shards, and how much text the
model was trained to read at once.

Knows Hugging Face's files; knows nothing of stores or forests. One tensor at a time is in memory, but for the
check that a model with fewer positions is the same model: it opens the two one after the other.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from btm_cluster.errors import UserError
from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.configuration import LENGTH_FIELDS, config_from
from btm_cluster.language_model.model import fresh_on_meta, load_model
from btm_cluster.language_model.published_weights import published
from btm_cluster.language_model.stored_weights import SHARD_BYTES, FirstRows, StoredWeights, write_shards
from btm_cluster.language_model.tensor_files import names_in_order

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"


def write_model(
    config: Path,
    weights: StoredWeights,
    folder: Path,
    trained_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a stored model's configuration and weights into `folder`, with an index where there are several
    files.

    With `trained_tokens`, config.json names that length where it claims a longer one, and positions that have
    weights of their own lose those that were never trained. Evaluation harnesses read as much at once as a
    model claims.
    """
    fields = _read(config)
    if trained_tokens is not None:
        fields, weights = _shortened(fields, weights, trained_tokens)
    _write(folder / CONFIG, fields)
    write_shards(published(weights, fields["model_type"]), folder, shard_bytes)


def say_block_length(folder: Path, block_tokens: int) -> None:
    """Makes tokenizer_config.json name the trained block length."""
    _write(folder / TOKENIZER_CONFIG, _read(folder / TOKENIZER_CONFIG) | {"model_max_length": block_tokens})


def _shortened(
    before: dict[str, Any], weights: StoredWeights, block_tokens: int
) -> tuple[dict[str, Any], StoredWeights]:
    """The configuration with the trained length, and the weights that fit it.

    As they were where they claim no more, or where the model would predict something else.
    """
    known = config_from(before)
    longer = [
        name
        for name in LENGTH_FIELDS
        if name in known.to_dict() and (getattr(known, name) or 0) > block_tokens
    ]
    after = before | dict.fromkeys(longer, block_tokens)
    rows = _rows_to_keep(weights, after) if longer else None
    if rows is None:
        return before, weights
    cut = FirstRows(weights, rows)
    # Some architectures compute something else from their length.
    return (after, cut) if _predict_alike(before, weights, after, cut, block_tokens) else (before, weights)


def _rows_to_keep(weights: StoredWeights, config: Mapping[str, Any]) -> dict[str, int] | None:
    """The number of rows to keep, by name, of each tensor that is longer than in the configuration; None where
    a tensor differs in more than its length."""
    header = weights.header
    wanted = {name: list(tensor.shape) for name, tensor in fresh_on_meta(config).state_dict().items()}
    rows = {}
    for name in names_in_order(header):
        held = header[name]["shape"]
        if held == wanted[name]:
            continue
        if held[1:] != wanted[name][1:] or held[0] < wanted[name][0]:
            return None
        rows[name] = wanted[name][0]
    return rows


def _predict_alike(
    config: Mapping[str, Any],
    weights: StoredWeights,
    other_config: Mapping[str, Any],
    other_weights: StoredWeights,
    block_tokens: int,
) -> bool:
    def predicted(config: Mapping[str, Any], weights: StoredWeights) -> torch.Tensor:
        model = load_model(config, weights)
        return logits_of(model, random_block(model.config.vocab_size, block_tokens), str(weights))

    try:
        one, other = predicted(config, weights), predicted(other_config, other_weights)
    except UserError:
        return False
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _write(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
