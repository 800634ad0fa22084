"""Causal language models from transformers: configurations, building, loading and saving in Hugging Face layout."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from btm_cluster.errors import PlanError, UserError, one_line
from btm_cluster.plan import ModelPlan, Preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY_MULTIPLE = (
    64  # embedding rows: matrix units want multiples of 64; the rows beyond the tokenizer stay unused
)

# Paper, table 2: GPT-3 architecture. width and heads as in its released code.
_SHAPES: dict[Preset, tuple[int, int, int]] = {
    "gpt3-125m": (12, 768, 12),
    "gpt3-350m": (24, 1024, 16),
    "gpt3-750m": (24, 1536, 16),
    "gpt3-1.3b": (24, 2048, 32),
}


def full_config(plan: ModelPlan, vocabulary: int, block_tokens: int) -> dict[str, Any]:
    """The configuration that a plan means, for a tokenizer of `vocabulary` tokens.

    What the plan leaves to transformers' defaults is left out, so that a new field of a newer transformers does not rename
    every model.

    Raises:
        PlanError: an unknown model type or field, or a model that cannot read a whole block.
    """
    if plan.preset is not None:
        layers, width, heads = _SHAPES[plan.preset]
        given: dict[str, Any] = {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads}
    else:
        given = dict(plan.config or {})
    if "vocab_size" in given:
        raise PlanError("model.config.vocab_size follows from the tokenizer", remedy="leave it out")
    if given["model_type"] == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        given = {"activation_function": "gelu", "n_positions": block_tokens} | no_dropout | given
    given |= {"bos_token_id": None, "eos_token_id": None}  # the tokenizer's, written with the weights
    given["vocab_size"] = -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    config = _build_config(given)
    if getattr(config, "num_hidden_layers", 1) < 1:
        raise PlanError("model.config has no layer", found=str(config.num_hidden_layers), remedy="give it at least one")
    check_fits(config, vocabulary, block_tokens)
    return given


def check_causal(model: "PreTrainedModel", name: str) -> None:
    """Refuses a model whose first tokens see the last one, such as BERT: it would read what it is asked to predict.

    Raises:
        UserError: naming the model.
    """
    tokens = torch.arange(8).remainder(model.config.vocab_size)[None]
    changed = tokens.clone()
    changed[0, -1] = 0
    was_training = model.training
    with torch.inference_mode():
        one, other = (model.eval()(input_ids=ids).logits[0, :-1] for ids in (tokens, changed))
    model.train(was_training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
        raise UserError(
            f"{name} is no causal language model",
            found="predictions that depend on later tokens",
            expected="a model that reads from left to right",
            remedy="give a decoder, such as gpt2 or llama",
        )


def check_fits(config: PretrainedConfig, vocabulary: int, block_tokens: int) -> None:
    """Refuses a model that knows fewer tokens than the tokenizer, or cannot read a whole block.

    Raises:
        PlanError: naming which.
    """
    if config.vocab_size < vocabulary:
        raise PlanError(
            "the model knows fewer tokens than the tokenizer has",
            found=str(config.vocab_size),
            expected=f"at least {vocabulary}",
            remedy="give the tokenizer that belongs to the model: tokenizer: {pretrained: …}",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest < block_tokens:
        raise PlanError(
            "training.block_tokens is longer than the model can read",
            found=str(block_tokens),
            expected=f"at most {longest}, the model's max_position_embeddings",
            remedy="shorten the blocks or lengthen the model's positions",
        )


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain JSON values, without what depends on the installation."""
    plain: dict[str, Any] = config.to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"):
        plain.pop(name, None)
    return plain


def _build_config(given: Mapping[str, Any]) -> PretrainedConfig:
    fields = {name: value for name, value in given.items() if name != "model_type"}
    try:
        known = AutoConfig.for_model(given["model_type"])
    except ValueError as exc:
        raise PlanError(
            "model.config.model_type is unknown to transformers",
            found=str(given["model_type"]),
            remedy="use one of transformers' causal language models, such as gpt2 or llama",
        ) from exc
    names = {*known.to_dict(), *getattr(known, "attribute_map", {})}
    for name in fields:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            raise PlanError(
                f"model.config.{name} is no field of {given['model_type']}",
                remedy=f"did you mean `{nearest[0]}`?" if nearest else f"known: {', '.join(sorted(names))}",
            )
    try:
        config = AutoConfig.for_model(given["model_type"], **fields)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as exc:  # transformers raises anything from KeyError to ZeroDivisionError on a bad shape
        raise PlanError(
            f"no {given['model_type']} can be built from model.config",
            found=one_line(exc),
            remedy="mend its shape: widths that heads divide, and a model_type that is a causal language model",
        ) from exc
    return config


def build_model(config: Mapping[str, Any], random_seed: int) -> "PreTrainedModel":
    """A model with fresh float32 weights, a pure function of the configuration and the seed."""
    torch.manual_seed(random_seed)
    return _fresh(config)


def load_weights(model: "PreTrainedModel", file: Path) -> None:
    """Loads a safetensors file into `model`, tied weights included."""
    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise UserError(f"{file.name} does not fit the model", found=f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()


def load_model(config: Mapping[str, Any], file: Path) -> "PreTrainedModel":
    """A model with the weights of a safetensors file, in float32."""
    # Built fresh, not on the meta device: buffers that are computed and never stored need their values.
    model = _fresh(config)
    load_weights(model, file)
    return model


def weights_of(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The parameters by name, each tied one once, in a fixed order."""
    return {name: p.detach() for name, p in sorted(model.named_parameters())}


def save_weights(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors as safetensors, in the layout that transformers opens.

    Raises:
        OSError: the file cannot be written, as by any other writer; safetensors has the system's number in words only.
    """
    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as exc:
        number = re.search(r"os error (\d+)", str(exc))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from exc


def has_dropout(model: "PreTrainedModel") -> bool:
    """Whether training it draws random numbers: as modules, or as shares in its configuration, written there or by default."""
    shares = (
        value
        for name, value in model.config.to_dict().items()
        if ("drop" in name) and not name.startswith(("summary", "classifier"))  # of heads that are not ours
    )
    if any(isinstance(value, float | int) and value > 0 for value in shares):
        return True
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def count_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """All parameters, and those that are not embeddings."""
    model = fresh_on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    embeddings = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        embeddings[id(output.weight)] = output.weight.numel()
    return total, total - sum(embeddings.values())


def write_config(config: Mapping[str, Any], end_of_text: int | None, folder: Path) -> Path:
    """Writes config.json, with the class that opens it and the tokenizer's end-of-text token.

    Without the version of transformers: a forest outlives several, and its models must stay alike.
    """
    loaded = _config_from(config)
    loaded.architectures = [type(fresh_on_meta(config)).__name__]
    loaded.eos_token_id = loaded.bos_token_id = end_of_text
    loaded.save_pretrained(str(folder))
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.pop("transformers_version", None)
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def _config_from(config: Mapping[str, Any]) -> PretrainedConfig:
    fields = {name: value for name, value in config.items() if name != "model_type"}
    return AutoConfig.for_model(config["model_type"], **fields)


def _fresh(config: Mapping[str, Any]) -> "PreTrainedModel":
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_config_from(config), dtype=torch.float32)
    return model


def fresh_on_meta(config: Mapping[str, Any]) -> "PreTrainedModel":
    """A model without values, for its names and shapes."""
    with torch.device("meta"):
        return _fresh(config)
