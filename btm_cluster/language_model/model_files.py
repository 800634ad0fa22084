"""The files of a pretrained model: which they are, whether they are whole, and
whether their tensors are the model's.

Reads headers, and of tensors only the few that decide whether a model can be opened as its configuration
says.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from btm_cluster.errors import UserError, one_line
from btm_cluster.language_model.model import name_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONSTANT_NAMES = ("rotary_emb.inv_freq", ".masked_bias", "position_ids", "decoder.version")
"""Tensors that older versions of transformers stored, and the model computes."""
_FLOATS = {"F64", "F32", "F16", "BF16"}


class StoredTensor(NamedTuple):
    """A tensor as the header of its file says it."""

    file: Path
    shape: list[int]
    dtype: str
    """In safetensors' words, such as BF16."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers opens: the one, or those that the index names.

    Raises:
        UserError: there are none, or some are missing.
    """
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    found = ""
    files = [one]
    if not one.is_file() and index.is_file():
        try:
            files = [
                folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            found = f"{index.name}: {one_line(exc) or type(exc).__name__}"
    missing = [file.name for file in (folder / "config.json", *files) if not file.is_file()]
    if missing and not found:
        there = ", ".join(sorted(p.name for p in folder.iterdir()))[:200] or "nothing in it"
        found = f"no {', '.join(missing[:3])}{' …' * (len(missing) > 3)}; {there}"
    if found:
        raise UserError(
            f"{folder} is no model folder",
            found=found,
            expected="config.json, and model.safetensors or all files of model.safetensors.index.json",
            remedy="copy what is missing, or save the model with save_pretrained; an adapter must be merged "
            "into its model first",
        )
    return files


def stored_tensors(source: str, files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files, which must be as long as their headers say.

    Raises:
        UserError: one is not.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(file, part.get_shape(), part.get_dtype())
        except (SafetensorError, OSError) as exc:
            raise unreadable(source, f"{file.name}: {one_line(exc)}") from exc
    return found


def check_tensors(source: str, stored: Mapping[str, StoredTensor], model: "PreTrainedModel") -> None:
    """Refuses tensors that cannot be those of `model`, which needs no values.

    Transformers renames and joins some tensors while it loads: names are judged where those that differ all
    lie on one side.

    Raises:
        UserError: naming tensors that are missing, unexpected, of another shape, or quantised.
    """
    own = model.state_dict()
    floats = [
        name
        for name, t in stored.items()
        if name in own and own[name].is_floating_point() and t.dtype not in _FLOATS
    ]
    if floats:
        raise quantised(source, f"{stored[floats[0]].dtype} in {name_tensors({'tensors': floats})}")
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*ties, *(other for one, other in ties.items() if one in stored)}  # either of the two is stored
    wrong = {
        "missing": sorted(own.keys() - stored.keys() - tied),
        "mismatched": sorted(
            name for name, t in stored.items() if name in own and list(own[name].shape) != t.shape
        ),
        "unexpected": sorted(
            n
            for n in stored.keys() - own.keys()
            if not (_is_passed_over(model, n) or says_nothing(stored, n))
        ),
    }
    if wrong["missing"] and wrong["unexpected"]:
        wrong["missing"] = wrong["unexpected"] = []
    if any(wrong.values()):
        raise do_not_match(source, wrong)


def has_own_head(stored: Mapping[str, StoredTensor], model: "PreTrainedModel") -> bool:
    """Whether the files hold an output head of other values than the
    embeddings, to which the configuration ties it."""
    for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if one in stored and other in stored and not torch.equal(_read(stored, one), _read(stored, other)):
            return True
    return False


def says_nothing(stored: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether a tensor holds masks, positions or frequencies that older versions of transformers stored."""
    if name.endswith(_CONSTANT_NAMES):
        return True
    return name.endswith(".bias") and len(stored[name].shape) == 4 and _is_mask(_read(stored, name))


def unreadable(source: str, found: str) -> UserError:
    """A model folder whose weights are not whole."""
    return UserError(
        f"cannot read the weights in {source}",
        found=found,
        expected="whole *.safetensors files",
        remedy="copy or save the model again",
    )


def do_not_match(source: str, wrong: Mapping[str, Sequence[str]]) -> UserError:
    """Tensors of a model folder, by what is wrong with them."""
    return UserError(
        f"the weights in {source} do not match its config.json",
        found=name_tensors(wrong),
        expected="exactly the tensors of the configuration",
        remedy="restore its config.json, or save the model again with save_pretrained",
    )


def quantised(source: str, found: str) -> UserError:
    """A model whose weights cannot be trained."""
    return UserError(
        f"{source} is quantised",
        found=found,
        expected="weights in float32, bfloat16 or float16, which can be trained",
        remedy="give the model from which it was quantised",
    )


def _is_passed_over(model: "PreTrainedModel", name: str) -> bool:
    """Whether the architecture itself leaves a tensor out, such as the layers
    that predict several tokens at once."""
    return any(
        re.search(pattern, name)
        for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    )


def _read(stored: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    with safe_open(stored[name].file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _is_mask(tensor: torch.Tensor) -> bool:
    """A causal mask [1, 1, n, n], of a window or not: zeros and ones, and none
    of the ones above the diagonal."""
    if tensor.ndim != 4 or tensor.shape[:2] != (1, 1) or tensor.shape[2] != tensor.shape[3]:
        return False
    return not torch.triu(tensor.float(), 1).any() and bool(((tensor == 0) | (tensor == 1)).all())
