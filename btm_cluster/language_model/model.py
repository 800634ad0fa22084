"""Causal language models from transformers: building, loading and saving in Hugging Face layout."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from btm_cluster.data.tokenizer import TextTokenizer
from btm_cluster.errors import IncompatibleError, one_line
from btm_cluster.language_model.configuration import config_from
from btm_cluster.language_model.stored_weights import StoredWeights
from btm_cluster.language_model.tensor_files import Header, layout, names_in_order, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(config: Mapping[str, Any], random_seed: int) -> "PreTrainedModel":
    """A model with fresh float32 weights, a pure function of the configuration and the seed."""
    torch.manual_seed(random_seed)
    return _fresh(config)


def load_weights(model: "PreTrainedModel", weights: StoredWeights) -> None:
    """Loads stored weights into `model`, tied ones included, in its own dtypes.

    Raises:
        IncompatibleError: naming tensors that are missing, unexpected or of another shape or dtype.
    """
    check_dtypes(model, weights)
    _load(model, {name: weights.read(name) for name in names_in_order(weights.header)}, weights)


def load_model(
    config: Mapping[str, Any],
    weights: StoredWeights,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A model with stored weights; `dtype` is that of its parameters, as `in_precision` has it.

    Memory: the model, and one tensor as it is stored.

    Raises:
        IncompatibleError: as for `load_weights`.
    """
    model = in_precision(fresh_without_values(config), dtype)
    fill(model, weights, device)
    return model


def fill(model: "PreTrainedModel", weights: StoredWeights, device: torch.device | str) -> None:
    """Gives a model without values those of stored weights, on a device, in the types that its parameters have.

    Memory: the model, and one tensor as it is stored.

    Raises:
        IncompatibleError: as for `load_weights`.
    """
    check_dtypes(model, weights)
    own = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = defaultdict(list)
    for name, tensor in own.items():
        tied[id(tensor)].append(name)
    tensors: dict[str, torch.Tensor] = {}
    for name in names_in_order(weights.header):
        tensor = weights.read(name, device)
        if name in own:
            # A copy: on the CPU, what is read may be a view of a mapped file.
            tensor = tensor.to(own[name].dtype, copy=tensor.device.type == "cpu")
        tensors |= dict.fromkeys((name, *tied[id(own.get(name))]), tensor)
    _load(model, tensors, weights, assign=True)
    model.to(device)


def _load(
    model: "PreTrainedModel",
    tensors: Mapping[str, torch.Tensor],
    weights: StoredWeights,
    assign: bool = False,
) -> None:
    found = ""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=assign)
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


def check_dtypes(model: "PreTrainedModel", weights: StoredWeights) -> None:
    """Refuses parameters of several dtypes: shards of several models.

    Raises:
        IncompatibleError: naming a parameter of each dtype.
    """
    names = _cast_parameters(model) & weights.header.keys()
    found = {weights.header[name]["dtype"]: name for name in sorted(names)}
    if len(found) > 1:
        raise IncompatibleError(
            f"{weights} mixes weights of several dtypes",
            found="; ".join(f"{dtype}: {name}" for dtype, name in sorted(found.items())),
            expected="one dtype in all shards",
            remedy="restore the shards that were stored together",
        )


def name_tensors(wrong: Mapping[str, Sequence[str]]) -> str:
    """Names of tensors by what is wrong with them, the first three of each."""
    return "; ".join(
        f"{kind}: {', '.join(names[:3])}{' …' * (len(names) > 3)}" for kind, names in wrong.items() if names
    )


def in_precision(model: "PreTrainedModel", dtype: torch.dtype) -> "PreTrainedModel":
    """A float32 model with its parameters in `dtype`, but for those that its architecture wants in float32.

    Buffers stay as they are: rotary frequencies in bf16 would blur positions.
    """
    cast = _cast_parameters(model)
    for name, parameter in model.named_parameters():
        if name in cast:
            parameter.data = parameter.data.to(dtype)
    return model


def _cast_parameters(model: "PreTrainedModel") -> set[str]:
    """The names of the parameters that `in_precision` casts."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    stays = re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in kept) or "$.")
    return {name for name, p in model.named_parameters() if p.is_floating_point() and not stays.search(name)}


def weights_of(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """All that a model stores, by name, in a fixed order: its parameters, each
    tied one once, and its persistent buffers."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    stored = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in stored}
    return dict(sorted((parameters | buffers).items()))


def layout_of(model: "PreTrainedModel", dtype: torch.dtype) -> Header:
    """The header of the file of a float32 model whose parameters are stored in `dtype`, as `in_precision` has
    them."""
    cast = _cast_parameters(model)
    return layout(
        {
            name: torch.empty(tensor.shape, dtype=dtype if name in cast else tensor.dtype, device="meta")
            for name, tensor in weights_of(model).items()
        }
    )


def save_weights(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors as safetensors, in the layout that transformers opens."""
    write_tensors(layout(tensors), tensors.items(), file)


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


def write_config(
    config: Mapping[str, Any], tokenizer: TextTokenizer, folder: Path, dtype: str = "float32"
) -> Path:
    """Writes config.json, with the class that opens it, and the type of the weights where that is not float32.

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
    if dtype != "float32":
        fields["dtype"] = dtype
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def _fresh(config: Mapping[str, Any]) -> "PreTrainedModel":
    loaded = config_from(config)
    # transformers before 5.24 takes a fused kernel here too, which leaves the cap out without a word.
    is_capped = getattr(loaded.get_text_config(), "attn_logit_softcapping", None) is not None
    attention = {"attn_implementation": "eager"} if is_capped else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        loaded, dtype=torch.float32, trust_remote_code=False, **attention
    )
    return model


def fresh_without_values(config: Mapping[str, Any]) -> "PreTrainedModel":
    """A model whose parameters have no memory yet, on the meta device; buffers that are computed have their
    values.

    As transformers itself loads: it computes buffers where it draws weights, which costs nothing on that device.
    """
    model = fresh_on_meta(config)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()
    return model


def model_of_undefined_values(config: Mapping[str, Any], device: torch.device | str) -> "PreTrainedModel":
    """A model with memory on a device for its parameters, whose values are undefined."""
    model = fresh_without_values(config)
    allocate(model, device)
    return model


def allocate(module: torch.nn.Module, device: torch.device | str) -> None:
    """Gives memory on a device to the parameters that have none; their values are undefined. What is tied stays
    so."""
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in made:
                    values = torch.empty_like(parameter, device=device)
                    made[parameter] = torch.nn.Parameter(values, parameter.requires_grad)
                setattr(owner, name, made[parameter])


def fresh_on_meta(config: Mapping[str, Any]) -> "PreTrainedModel":
    """A model without values, for its names and shapes."""
    with torch.device("meta"):
        return _fresh(config)
