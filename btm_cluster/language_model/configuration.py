"""Configurations of transformers' causal language models: from what a plan says, checked, and as plain JSON."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from btm_cluster.errors import PlanError, one_line
from btm_cluster.language_model.block_check import check_reads_if_small
from btm_cluster.plan import ModelPlan, Preset

_VOCABULARY_MULTIPLE = 64
"""The number of embedding rows is a multiple of it: matrix units work in such steps. Rows beyond the tokenizer's
vocabulary stay unused."""
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Names that configurations give to the most tokens that a model reads at
once; each architecture has its own."""

# Paper, table 2: GPT-3 architecture. width and heads as in its released code.
_SHAPES: dict[Preset, tuple[int, int, int]] = {
    "gpt3-125m": (12, 768, 12),
    "gpt3-350m": (24, 1024, 16),
    "gpt3-750m": (24, 1536, 16),
    "gpt3-1.3b": (24, 2048, 32),
}


def full_config(plan: ModelPlan, vocabulary: int, block_tokens: int) -> dict[str, Any]:
    """The configuration that a plan means, for a tokenizer of `vocabulary` tokens.

    What the plan leaves to transformers' defaults is left out, so that a new field of a newer transformers
    does not rename every model.

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
        raise PlanError(
            "model.config has no layer", found=str(config.num_hidden_layers), remedy="give it at least one"
        )
    check_fits(config, vocabulary, block_tokens)
    check_reads_if_small(config, block_tokens, f"a {given['model_type']}")
    return given


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
    name, longest = longest_block(config)
    if longest < block_tokens:
        raise PlanError(
            "training.block_tokens is longer than the model can read",
            found=str(block_tokens),
            expected=f"at most {longest}, the model's {name}",
            remedy="shorten the blocks or lengthen the model's positions",
        )


def longest_block(config: PretrainedConfig) -> tuple[str, float]:
    """How many tokens a model says that it reads at most, and the field that
    says so; infinite where none does."""
    fields = {name: getattr(config, name, None) for name in LENGTH_FIELDS}
    limits = [(value, name) for name, value in fields.items() if isinstance(value, int) and value > 0]
    longest, name = min(limits, default=(math.inf, ""))
    return name, longest


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain JSON values, without what depends on the installation."""
    # By transformers' own JSON: it has words for infinity, which some configurations hold and JSON does not.
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"):
        plain.pop(name, None)
    return plain


def config_from(plain: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration in plain JSON values: those of a plan, of `plain_config` or of a config.json."""
    fields = {name: _with_floats(value) for name, value in plain.items() if name != "model_type"}
    return AutoConfig.for_model(plain["model_type"], **fields)


def _with_floats(value: Any) -> Any:
    """A value in which infinity and NaN are numbers again: transformers writes
    them as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _with_floats(part) for name, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


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
    if type(known) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PlanError(
            f"a {given['model_type']} is no causal language model",
            expected="a model_type that transformers' AutoModelForCausalLM builds",
            remedy="give a decoder, such as gpt2 or llama",
        )
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
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as exc:  # transformers raises anything from KeyError to ZeroDivisionError on a bad shape
        raise PlanError(
            f"no {given['model_type']} can be built from model.config",
            found=one_line(exc),
            remedy="mend its shape: widths that heads divide, and a model_type that is a causal language "
            "model",
        ) from exc
    return config
