"""Models and tokenizers from elsewhere: found on disk or on the hub, identified
by content, checked before they are read.

Code that comes with a model is neither downloaded nor run.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.data.tokenizer import (
    MORE_CHAT_TEMPLATES,
    TextTokenizer,
    import_tokenizer,
    open_pretrained_tokenizer,
)
from btm_cluster.errors import UserError, one_line
from btm_cluster.language_model.block_check import check_reads_if_small
from btm_cluster.language_model.configuration import check_fits, plain_config
from btm_cluster.language_model.model_files import (
    check_tensors,
    has_own_head,
    quantised,
    stored_tensors,
    weight_files,
)
from btm_cluster.requests import ImportTokenizer, Pretrained
from btm_cluster.storage.file_hashes import sha256_of

_TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_PATTERNS = ("*.json", "*.safetensors", "LICENSE*", "NOTICE*")
_TOKENIZER_NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip


def resolve(source: str, patterns: Sequence[str] = _TOKENIZER_PATTERNS) -> Path:
    """The local folder of a pretrained model or tokenizer: `source` itself, or
    the hub's files that match `patterns`.

    Raises:
        UserError: neither is there.
    """
    folder = Path(os.path.expanduser(source))
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
    """The location of a source for another node, with other folders: a whole path, or the hub's name."""
    folder = Path(os.path.expanduser(source))
    return str(folder.absolute()) if folder.is_dir() else source


def pretrained_tokenizer(source: str, first_token: str | None) -> tuple[ImportTokenizer, TextTokenizer]:
    """The request that imports a pretrained tokenizer, and the tokenizer.

    `first_token` as in `open_pretrained_tokenizer`.

    Raises:
        UserError: it cannot be used.
    """
    folder = resolve(source)
    sha256 = pretrained_tokenizer_hash(folder)
    tokenizer = _opened(folder, sha256, first_token)
    first, end = tokenizer.name(tokenizer.first_token), tokenizer.name(tokenizer.end_of_text)
    return ImportTokenizer("tokenizer", source_of(source), sha256, first, end), tokenizer


@lru_cache(maxsize=4)
def _opened(folder: Path, sha256: str, first_token: str | None) -> TextTokenizer:  # noqa: ARG001 (of what is there now)
    return open_pretrained_tokenizer(folder, first_token)


def import_pretrained_tokenizer(
    request: ImportTokenizer, folder: Path
) -> tuple[dict[str, Path], TextTokenizer]:
    """Writes a pretrained tokenizer below `folder`; returns its files by name, and the tokenizer.

    Raises:
        UserError: it cannot be used, or is another one here than the driver found.
    """
    found = resolve(request.source)
    check_same(request.source, request.sha256, pretrained_tokenizer_hash(found))
    tokenizer = open_pretrained_tokenizer(found, request.first_token)
    return import_tokenizer(found, tokenizer, folder), tokenizer


def pretrained_tokenizer_hash(folder: Path) -> str:
    """Identifies a tokenizer by the content of its files."""
    names = [folder / name for name in _TOKENIZER_NAMES if (folder / name).is_file()]
    return _hash_files([*names, *sorted(folder.glob("*.model")), *sorted(folder.glob(MORE_CHAT_TEMPLATES))])


def pretrained_model(source: str) -> Pretrained:
    """Locates a pretrained model, identified by the content of its configuration and weights.

    Raises:
        UserError: no model is there.
    """
    return Pretrained(source_of(source), model_hash(resolve(source, MODEL_PATTERNS)))


def model_hash(folder: Path) -> str:
    """Identifies a model by the content of its configuration and weights."""
    return _hash_files([folder / "config.json", *weight_files(folder)])


def check_same(source: str, expected: str, found: str) -> None:
    """Refuses files that are others here than the driver found."""
    if found != expected:
        raise UserError(
            f"{source} is another one on this machine than where the run was started",
            found=f"files with the hash {found[:12]}",
            expected=expected[:12],
            remedy="give all machines the same folder, or remove what they downloaded earlier",
        )


def pretrained_config(pretrained: Pretrained, vocabulary: int, block_tokens: int) -> dict[str, Any]:
    """The configuration of a pretrained model, in full; of a model with parts, that of its text part.

    Checks all that can be told without reading the weights.

    Raises:
        UserError: it is none of a causal language model, is quantised, its files are not whole, or the model
            fits neither the tokenizer nor the blocks.
    """
    folder = resolve(pretrained.source, MODEL_PATTERNS)
    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = whole.get_text_config()
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # Transformers raises anything from KeyError to ImportError on what it does not know.
    except Exception as exc:
        raise UserError(
            f"{pretrained.source} is no causal language model",
            found=one_line(exc),
            expected="a config.json that AutoModelForCausalLM knows without code of its own",
            remedy="give a model of another architecture, or save this one again with save_pretrained",
        ) from exc
    if getattr(whole, "quantization_config", None) is not None:
        raise quantised(pretrained.source, "a quantization_config in its config.json")
    check_fits(config, vocabulary, block_tokens)
    stored = stored_tensors(pretrained.source, weight_files(folder))
    check_tensors(pretrained.source, stored, model)
    check_reads_if_small(config, block_tokens, pretrained.source)
    if has_own_head(stored, model):  # transformers unties them too, whatever the configuration says
        config.tie_word_embeddings = False
    return plain_config(config)


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + sha256_of(path))
    return digest.hexdigest()
