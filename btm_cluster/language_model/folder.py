"""A model's folder as other programs open it: it says how much text the model was trained to read at once.

Knows Hugging Face's files; knows nothing of stores or forests.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from btm_cluster.errors import UserError
from btm_cluster.language_model.block_check import logits_of, random_block
from btm_cluster.language_model.model import (
    LENGTH_FIELDS,
    config_from,
    fresh_on_meta,
    load_model,
    save_weights,
)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def say_block_length(folder: Path, block_tokens: int) -> None:
    """Makes config.json and tokenizer_config.json name the trained block
    length, where they claim more or nothing.

    Evaluation harnesses read as much at once as a model claims, and what is beyond a trained block was never
    learned. Positions that have weights of their own lose those that were never trained.
    """
    tokenizer = _read(folder / "tokenizer_config.json") | {"model_max_length": block_tokens}
    _write(folder / "tokenizer_config.json", tokenizer)
    before = _read(folder / _CONFIG)
    known = config_from(before)
    longer = [
        name
        for name in LENGTH_FIELDS
        if name in known.to_dict() and (getattr(known, name) or 0) > block_tokens
    ]
    if not longer:
        return
    after = before | dict.fromkeys(longer, block_tokens)
    weights, shapes = (
        load_file(folder / _WEIGHTS),
        {n: t.shape for n, t in fresh_on_meta(after).state_dict().items()},
    )
    cut = {name: tensor[: shapes[name][0]] if tensor.ndim else tensor for name, tensor in weights.items()}
    if any(tensor.shape != shapes[name] for name, tensor in cut.items()):
        return
    save_weights(cut, folder / f"{_WEIGHTS}.cut")
    if _predict_alike(before, folder / _WEIGHTS, after, folder / f"{_WEIGHTS}.cut", block_tokens):
        (folder / f"{_WEIGHTS}.cut").replace(folder / _WEIGHTS)
        _write(folder / _CONFIG, after)
    else:  # an architecture that computes something else from its length
        (folder / f"{_WEIGHTS}.cut").unlink()


def _predict_alike(
    config: dict[str, Any],
    weights: Path,
    other_config: dict[str, Any],
    other_weights: Path,
    block_tokens: int,
) -> bool:
    try:
        one, other = (
            logits_of(model, random_block(model.config.vocab_size, block_tokens), str(weights.parent))
            for model in (load_model(config, weights), load_model(other_config, other_weights))
        )
    except UserError:
        return False
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _write(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
