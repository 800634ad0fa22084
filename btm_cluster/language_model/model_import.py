"""Brings a pretrained model into a store: as transformers opens it, and the same once it is opened again.

Code that comes with a model is neither downloaded nor run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.errors import UserError, one_line
from btm_cluster.language_model.block_check import check_reads, imported_block_tokens, logits_of, random_block
from btm_cluster.language_model.model import (
    fresh_on_meta,
    in_precision,
    layout_of,
    load_model,
    name_tensors,
    weights_of,
)
from btm_cluster.language_model.model_files import (
    do_not_match,
    says_nothing,
    stored_tensors,
    unreadable,
    weight_files,
)
from btm_cluster.language_model.pretrained import MODEL_PATTERNS, check_same, model_hash, resolve
from btm_cluster.language_model.stored_weights import open_files, write_weights
from btm_cluster.language_model.tensor_files import DTYPES, INDEX
from btm_cluster.requests import Pretrained, TrainRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT_PATTERNS = ("generation_config.json", "LICENSE*", "NOTICE*")
"""Files that come with a model beside its weights, for whoever opens one that was merged from it."""
LARGEST_DIFFERENCE = 1e-3
"""Nats between a token's log-probability by transformers and by the stored
model: rounding is a hundredth of it."""


def import_model(
    request: TrainRequest, tokenizer: TextTokenizer, folder: Path
) -> tuple[dict[str, Path], dict[str, Any], dict[str, Any]]:
    """Writes a pretrained model as the seed below `folder`: files, facts and note for its commit.

    What was written is opened again, and must predict the same as transformers' own model.

    Raises:
        UserError: weights that cannot be read, do not match the configuration, are not finite or see later
            tokens, or a model that is another one once it is stored.
    """
    assert request.pretrained is not None
    source = request.pretrained.source
    model = _load(request.pretrained)
    block_tokens = imported_block_tokens(model, request.training.block_tokens)
    dtype = getattr(torch, request.training.weights)
    _round(model, dtype, source)
    _check_finite(model, source)
    check_reads(model, block_tokens, source)
    probe_1T = random_block(tokenizer.vocabulary, block_tokens)
    expected = logits_of(model, probe_1T, source)
    weights = _text_weights(model, request.model, source)
    files = write_weights(layout_of(fresh_on_meta(request.model), dtype), weights.items(), folder)
    del model, weights  # one copy at a time
    found = logits_of(
        load_model(request.model, open_files(files.__getitem__, INDEX in files)), probe_1T, source
    )
    apart = float((torch.log_softmax(found, -1) - torch.log_softmax(expected, -1)).abs().max())
    if apart > LARGEST_DIFFERENCE:
        raise UserError(
            f"{source} is another model once it is stored and opened again",
            found=f"log-probabilities that differ by up to {apart:.2g} nats on a block",
            expected=f"those of transformers, within {LARGEST_DIFFERENCE:g}",
            remedy="save it again with save_pretrained, by the transformers that is used here",
        )
    original = resolve(source, MODEL_PATTERNS)
    kept = [path for pattern in _KEPT_PATTERNS for path in sorted(original.glob(pattern)) if path.is_file()]
    return files | {path.name: path for path in kept}, {"role": request.role, "tokens": 0}, {"from": source}


def _load(pretrained: Pretrained) -> "PreTrainedModel":
    folder = resolve(pretrained.source, MODEL_PATTERNS)
    check_same(pretrained.source, pretrained.sha256, model_hash(folder))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as exc:  # safetensors has an error of its own, beside those of transformers
        raise unreadable(pretrained.source, one_line(exc)) from exc
    # Transformers starts what is missing at random, and drops what is too much.
    names = {kind: loading[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")}
    wrong = {
        kind: sorted(key if isinstance(key, str) else key[0] for key in keys) for kind, keys in names.items()
    }
    stored = stored_tensors(pretrained.source, weight_files(folder))
    wrong["unexpected"] = [name for name in wrong["unexpected"] if not says_nothing(stored, name)]
    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # The parts that see or hear may be left out, each with a name of its own.
    if whole.get_text_config() is not whole:
        read = {name.split(".")[0] for name in stored.keys() - set(wrong["unexpected"])}
        wrong["unexpected"] = [name for name in wrong["unexpected"] if name.split(".")[0] in read]
    if any(wrong.values()):
        raise do_not_match(pretrained.source, wrong)
    return model


def _round(model: "PreTrainedModel", dtype: torch.dtype, source: str) -> None:
    """Rounds the weights to what is stored of them: those are the model that is checked."""
    original = stored_tensors(source, weight_files(resolve(source, MODEL_PATTERNS))).values()
    if dtype != torch.float32 and any(DTYPES.get(tensor.dtype) != dtype for tensor in original):
        in_precision(model, dtype).float()


def _text_weights(
    model: "PreTrainedModel", config: Mapping[str, Any], source: str
) -> dict[str, torch.Tensor]:
    """The weights that are stored of a model: all of them, or the text part of one that has others."""
    weights = weights_of(model)
    if model.config.get_text_config() is model.config:
        return weights
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    text = fresh_on_meta(config)
    places = {
        name: f"{decoder}.{name.removeprefix(f'{text.base_model_prefix}.')}"
        if name.startswith(f"{text.base_model_prefix}.")
        else name
        for name in weights_of(text)
    }
    missing = sorted(name for name, place in places.items() if place not in weights)
    if missing:
        raise do_not_match(source, {"missing in its text part": missing})
    return {name: weights[place] for name, place in places.items()}


def _check_finite(model: "PreTrainedModel", source: str) -> None:
    # A sum takes one pass and no memory; it may itself be too large for float32.
    unsure = {name: tensor for name, tensor in weights_of(model).items() if not tensor.sum().isfinite()}
    spoiled = [name for name, tensor in unsure.items() if not tensor.isfinite().all()]
    if spoiled:
        raise UserError(
            f"the weights in {source} are not finite",
            found=f"NaN or infinite values in {name_tensors({'tensors': spoiled})}",
            expected="finite weights",
            remedy="take another checkpoint: a half-precision overflow or a broken merge leaves such weights",
        )
