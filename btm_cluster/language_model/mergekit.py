"""The YAML by which mergekit makes the same merged model of the same folders.

Follows mergekit's `linear`, `task_arithmetic` and `ties`; needs no mergekit. Pure: returns text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_NAMES = {"task-arithmetic": "task_arithmetic", "ties": "ties"}


def linear(weights: Mapping[str, float], dtype: str) -> str:
    """Σ w_i θ_i of the models in folders, by folder or name on the hub, summed in float32 and stored in `dtype`."""
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights.items()]
    return _text({"merge_method": "linear", "models": models, "parameters": {"normalize": False}}, dtype)


def task_vectors(
    method: str, base: str, models: Sequence[str], scale: float, density: float, dtype: str
) -> str:
    """A merge of the models' task vectors, `task-arithmetic` or `ties`."""
    parameters: dict[str, Any] = {"normalize": method == "ties"}
    if method == "ties":
        own = {"weight": 1.0, "density": density}
        parameters |= {"lambda": scale} if scale != 1 else {}
    else:
        own = {"weight": scale}
    listed = [{"model": model, "parameters": dict(own)} for model in models]
    fields = {"merge_method": _NAMES[method], "base_model": base, "models": listed, "parameters": parameters}
    return _text(fields, dtype)


def _text(fields: Mapping[str, Any], dtype: str) -> str:
    stored = {} if dtype == "float32" else {"out_dtype": dtype}
    return yaml.safe_dump({**fields, "dtype": "float32", **stored}, sort_keys=False, allow_unicode=True)
