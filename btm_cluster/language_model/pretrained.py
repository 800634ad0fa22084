"""Models and tokenizers from elsewhere: found on disk or on the hub, identified by content, brought into a store."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from btm_cluster.errors import UserError
from btm_cluster.language_model.model import check_fits, plain_config, save_weights, weights_of
from btm_cluster.workers import Pretrained, TrainRequest

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def resolve(source: str) -> Path:
    """The local folder of a pretrained model or tokenizer: `source` itself, or a snapshot of the hub's.

    Raises:
        UserError: neither is there.
    """
    if Path(source).is_dir():
        return Path(source).absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_PATTERNS))
    except (OSError, ValueError) as exc:  # the hub's errors are one or the other
        raise UserError(
            f"cannot find the pretrained {source}",
            found=f"no such folder, and from the hub: {' '.join(str(exc).split())[:200]}",
            remedy="give a local folder, or a hub name that this machine can reach",
        ) from exc


def pretrained_tokenizer_hash(folder: Path) -> str:
    """Identifies a tokenizer by the content of its files."""
    return _hash_files([folder / name for name in _TOKENIZER_NAMES if (folder / name).is_file()])


def pretrained_vocabulary(folder: Path) -> int:
    """Number of tokens of a pretrained tokenizer."""
    return len(AutoTokenizer.from_pretrained(str(folder)))


def pretrained_model(source: str, trust_remote_code: bool) -> Pretrained:
    """Locates a pretrained model, identified by the content of its configuration and weights."""
    folder = resolve(source)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no model folder", found=str(sorted(p.name for p in folder.iterdir()))[:200],
            expected="config.json and *.safetensors", remedy="save it with save_pretrained",
        )  # fmt: skip
    return Pretrained(str(folder), _hash_files([folder / "config.json", *weights]), trust_remote_code)


def pretrained_config(pretrained: Pretrained, vocabulary: int, block_tokens: int) -> dict[str, Any]:
    """The configuration of a pretrained model, in full.

    Raises:
        UserError: it cannot be read, or the model fits neither the tokenizer nor the blocks.
    """
    try:
        config = AutoConfig.from_pretrained(pretrained.folder, trust_remote_code=pretrained.trust_remote_code)
    except (OSError, ValueError) as exc:
        raise UserError(f"cannot read the configuration in {pretrained.folder}", found=str(exc)) from exc
    check_fits(config, vocabulary, block_tokens)
    return plain_config(config)


def import_model(request: TrainRequest, folder: Path) -> tuple[dict[str, Path], dict[str, Any], dict[str, Any]]:
    """Writes a pretrained model as the seed below `folder`: files, facts and note for its commit."""
    assert request.pretrained is not None
    model = AutoModelForCausalLM.from_pretrained(
        request.pretrained.folder, dtype=torch.float32, trust_remote_code=request.pretrained.trust_remote_code
    )
    files = {"model.safetensors": folder / "model.safetensors"}
    save_weights(weights_of(model), files["model.safetensors"])
    return files, {"role": request.role, "tokens": 0}, {"from": request.pretrained.folder}


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
