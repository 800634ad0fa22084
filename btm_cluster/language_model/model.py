"""Causal language models from transformers: configurations, building, loading
and saving in Hugging Face layout."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.errors import IncompatibleError, PlanError, one_line
from btm_cluster.language_model.block_check import check_reads_if_small
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import names_in_order
from btm_cluster.plan import ModelPlan, Preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY_MULTIPLE = (
    64  # embedding rows: matrix units want multiples of 64; the rows beyond the tokenizer stay unused
)

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
            AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as exc:  # transformers raises anything from KeyError to ZeroDivisionError on a bad shape
        raise PlanError(
            f"no {given['model_type']} can be built from model.config",
            found=one_line(exc),
            remedy="mend its shape: widths that heads divide, and a model_type that is a causal language "
            "model",
        ) from exc
    return config


def build_model(config: Mapping[str, Any], random_seed: int) -> "PreTrainedModel":
    """A model with fresh float32 weights, a pure function of the configuration and the seed."""
    torch.manual_seed(random_seed)
    return _fresh(config)


def load_weights(model: "PreTrainedModel", weights: StoredWeights) -> None:
    """Loads stored weights into `model`, tied ones included.

    Raises:
        IncompatibleError: naming tensors that are missing, unexpected or of another shape.
    """
    found = ""
    try:
        tensors = {name: weights.read(name) for name in names_in_order(weights.header)}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        untied = sorted(set(missing) - set(getattr(model, "all_tied_weights_keys", None) or {}))
        found = name_tensors({"missing": untied, "unexpected": unexpected})
    except RuntimeError as exc:  # of other shapes
        found = one_line(exc)
    if found:
        raise unfit(weights, found)
    model.tie_weights()


def unfit(weights: StoredWeights, found: str) -> IncompatibleError:
    """The error of stored weights that are not a model's."""
    return IncompatibleError(
        f"{weights} does not fit the model",
        found=found,
        expected="exactly the tensors of its configuration",
        remedy="use the version of transformers by which the model was stored",
    )


def name_tensors(wrong: Mapping[str, Sequence[str]]) -> str:
    """Names of tensors by what is wrong with them, the first three of each."""
    return "; ".join(
        f"{kind}: {', '.join(names[:3])}{' …' * (len(names) > 3)}" for kind, names in wrong.items() if names
    )


def load_model(
    config: Mapping[str, Any],
    weights: StoredWeights,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A model with stored weights."""
    # Built fresh, not on the meta device: buffers that are computed and never stored need their values.
    model = _fresh(config)
    load_weights(model, weights)
    return model.to(device, dtype)


def weights_of(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """All that a model stores, by name, in a fixed order: its parameters, each
    tied one once, and its persistent buffers."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    stored = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in stored}
    return dict(sorted((parameters | buffers).items()))


def save_weights(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors as safetensors, in the layout that transformers opens.

    Raises:
        OSError: the file cannot be written, as by any other writer; safetensors has the system's number in
        words only.
    """
    try:
        save_file(
            {name: t.contiguous().cpu() for name, t in tensors.items()}, file, metadata={"format": "pt"}
        )
    except SafetensorError as exc:
        number = re.search(r"os error (\d+)", str(exc))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from exc


def has_dropout(model: "PreTrainedModel") -> bool:
    """Whether training it draws random numbers: as modules, or as shares in its
    configuration, written there or by default."""
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
    embeddings = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)
    }
    output = model.get_output_embeddings()
    if output is not None:
        embeddings[id(output.weight)] = output.weight.numel()
    return total, total - sum(embeddings.values())


def write_config(config: Mapping[str, Any], tokenizer: TextTokenizer, folder: Path) -> Path:
    """Writes config.json, with the class that opens it.

    Special tokens that it does not name are the tokenizer's.

    Without the version of transformers: a forest outlives several, and its models must stay alike.
    """
    loaded = config_from(config)
    loaded.architectures = [type(fresh_on_meta(config)).__name__]
    for name, token in (("bos_token_id", tokenizer.first_token), ("eos_token_id", tokenizer.end_of_text)):
        if getattr(loaded, name, None) is None:
            setattr(loaded, name, token)
    loaded.save_pretrained(str(folder))
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.pop("transformers_version", None)
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


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


def _fresh(config: Mapping[str, Any]) -> "PreTrainedModel":
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config_from(config), dtype=torch.float32, trust_remote_code=False
    )
    return model


def fresh_without_values(config: Mapping[str, Any]) -> "PreTrainedModel":
    """A model whose parameters have no memory yet, on the meta device; buffers that are computed have their
    values."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied is registered twice
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        return _fresh(config)
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def fresh_on_meta(config: Mapping[str, Any]) -> "PreTrainedModel":
    """A model without values, for its names and shapes."""
    with torch.device("meta"):
        return _fresh(config)
