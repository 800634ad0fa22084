"""Models and tokenizers from elsewhere: found on disk or on the hub, identified by content, brought into a store.

Code that comes with a model is neither downloaded nor run.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.errors import UserError, one_line
from btm_cluster.language_model.model import check_causal, check_fits, plain_config, save_weights, weights_of
from btm_cluster.language_model.tokenizer import import_tokenizer, open_pretrained_tokenizer
from btm_cluster.requests import ImportTokenizer, Pretrained, TrainRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model")
_MODEL_PATTERNS = ("*.json", "*.safetensors")
_TOKENIZER_NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")  # fmt: skip


def resolve(source: str, patterns: Sequence[str] = _TOKENIZER_PATTERNS) -> Path:
    """The local folder of a pretrained model or tokenizer: `source` itself, or the hub's files that match `patterns`.

    Raises:
        UserError: neither is there.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (OSError, ValueError) as exc:  # the hub's errors are one or the other
        raise UserError(
            f"cannot find the pretrained {source}",
            found=f"no such folder, and from the hub: {one_line(exc)}",
            expected="a local folder, or a name on the hub",
            remedy="check the path or name, and whether this machine reaches the hub",
        ) from exc


def source_of(source: str) -> str:
    """What another node, with other folders, understands by a source: a whole path, or the hub's name."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else source


def import_pretrained_tokenizer(request: ImportTokenizer, folder: Path) -> int:
    """Writes a pretrained tokenizer below `folder` and returns the number of its tokens.

    Raises:
        UserError: it cannot be used, or is another one here than the driver found.
    """
    found = resolve(request.source)
    _check_same(request.source, request.sha256, pretrained_tokenizer_hash(found))
    return import_tokenizer(str(found), folder)


def pretrained_tokenizer_hash(folder: Path) -> str:
    """Identifies a tokenizer by the content of its files."""
    names = [folder / name for name in _TOKENIZER_NAMES if (folder / name).is_file()]
    return _hash_files([*names, *sorted(folder.glob("*.model"))])


def pretrained_vocabulary(folder: Path) -> int:
    """Number of tokens of a pretrained tokenizer.

    Raises:
        UserError: it cannot be used.
    """
    return len(open_pretrained_tokenizer(str(folder)))


def pretrained_model(source: str) -> Pretrained:
    """Locates a pretrained model, identified by the content of its configuration and weights.

    Raises:
        UserError: no model is there.
    """
    return Pretrained(source_of(source), _model_hash(resolve(source, _MODEL_PATTERNS)))


def _model_hash(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is no model folder",
            found=", ".join(sorted(p.name for p in folder.iterdir()))[:200] or "nothing in it",
            expected="config.json and *.safetensors",
            remedy="save it with save_pretrained",
        )
    return _hash_files([folder / "config.json", *weights])


def _check_same(source: str, expected: str, found: str) -> None:
    if found != expected:
        raise UserError(
            f"{source} is another one on this machine than where the run was started",
            found=f"files with the hash {found[:12]}",
            expected=expected[:12],
            remedy="give all machines the same folder, or remove what they downloaded earlier",
        )


def pretrained_config(pretrained: Pretrained, vocabulary: int, block_tokens: int) -> dict[str, Any]:
    """The configuration of a pretrained model, in full.

    Raises:
        UserError: it is none of a causal language model, or the model fits neither the tokenizer nor the blocks.
    """
    try:
        config = AutoConfig.from_pretrained(resolve(pretrained.source, _MODEL_PATTERNS))
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as exc:  # transformers raises anything from KeyError to ImportError on what it does not know
        raise UserError(
            f"{pretrained.source} is no causal language model",
            found=one_line(exc),
            expected="a config.json that AutoModelForCausalLM knows without code of its own",
            remedy="give a model of another architecture, or save this one again with save_pretrained",
        ) from exc
    check_fits(config, vocabulary, block_tokens)
    return plain_config(config)


def import_model(request: TrainRequest, folder: Path) -> tuple[dict[str, Path], dict[str, Any], dict[str, Any]]:
    """Writes a pretrained model as the seed below `folder`: files, facts and note for its commit.

    Raises:
        UserError: weights that cannot be read, do not match the configuration, or see later tokens.
    """
    assert request.pretrained is not None
    model = _load(request.pretrained)
    check_causal(model, request.pretrained.source)
    files = {"model.safetensors": folder / "model.safetensors"}
    save_weights(weights_of(model), files["model.safetensors"])
    return files, {"role": request.role, "tokens": 0}, {"from": request.pretrained.source}


def _load(pretrained: Pretrained) -> "PreTrainedModel":
    folder = resolve(pretrained.source, _MODEL_PATTERNS)
    _check_same(pretrained.source, pretrained.sha256, _model_hash(folder))
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as exc:  # safetensors has an error of its own, beside those of transformers
        raise UserError(
            f"cannot read the weights in {pretrained.source}",
            found=one_line(exc),
            expected="whole *.safetensors files",
            remedy="copy or save the model again",
        ) from exc
    # Transformers starts what is missing at random, and drops what is too much.
    names = {kind: loading[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")}
    wrong = {kind: sorted(key if isinstance(key, str) else key[0] for key in keys) for kind, keys in names.items()}
    if any(wrong.values()):
        raise UserError(
            f"the weights in {pretrained.source} do not match its config.json",
            found="; ".join(
                f"{kind}: {', '.join(keys[:3])}{' …' * (len(keys) > 3)}" for kind, keys in wrong.items() if keys
            ),
            expected="exactly the tensors of the configuration",
            remedy="restore its config.json, or save the model again with save_pretrained",
        )
    return model


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(path.name.encode() + _hash_file(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _hash_file(path: Path, size: int, modified_ns: int) -> bytes:  # noqa: ARG001 (they tell when to read it again)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
