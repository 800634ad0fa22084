"""Files of an adapter of low rank (LoRA) as PEFT lays them out: their names, those of the matrices in them, and its
configuration. Knows neither models nor torch.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btm_cluster.plan import Lora

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = "default"
"""PEFT's, of a model's only adapter: within the names of its parameters, and not in files."""
_PREFIX = "base_model.model."
"""Before every name in PEFT's files."""


def stored_name(name: str) -> str:
    """The name that PEFT stores an adapter's parameter by."""
    return _PREFIX + name.replace(f".{ADAPTER_NAME}.", ".")


def layer_of(stored: str) -> str:
    """The name of the weight that a stored matrix, A or B, changes."""
    return re.sub(r"\.lora_[AB]\.weight$", ".weight", stored.removeprefix(_PREFIX))


def lora_of(config: Mapping[str, Any]) -> Lora:
    """The adapter that an adapter_config.json describes."""
    return Lora(config["r"], float(config["lora_alpha"]), tuple(sorted(config["target_modules"])))


def write_adapter_config(config: Mapping[str, Any], folder: Path) -> Path:
    """Writes adapter_config.json below `folder`."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file
