"""Models and tokenizers from elsewhere: found on disk or on the hub, identified by content, checked before they are read.

Code that comes with a model is neither downloaded nor run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from btm_cluster.errors import UserError, one_line
from btm_cluster.language_model.model import (
    check_fits,
    check_reads_if_small,
    name_tensors,
    plain_config,
)
from btm_cluster.language_model.tokenizer import TextTokenizer, import_tokenizer, open_pretrained_tokenizer
from btm_cluster.requests import ImportTokenizer, Pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_PATTERNS = ("*.json", "*.safetensors", "LICENSE*", "NOTICE*")
_TOKENIZER_NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip


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


def pretrained_tokenizer(source: str, first_token: str | None) -> tuple[ImportTokenizer, TextTokenizer]:
    """The request that imports a pretrained tokenizer, and the tokenizer. `first_token` as in `open_pretrained_tokenizer`.

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


def import_pretrained_tokenizer(request: ImportTokenizer, folder: Path) -> tuple[dict[str, Path], TextTokenizer]:
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
    return _hash_files([*names, *sorted(folder.glob("*.model"))])


def pretrained_model(source: str) -> Pretrained:
    """Locates a pretrained model, identified by the content of its configuration and weights.

    Raises:
        UserError: no model is there.
    """
    return Pretrained(source_of(source), model_hash(resolve(source, MODEL_PATTERNS)))


def model_hash(folder: Path) -> str:
    """Identifies a model by the content of its configuration and weights."""
    return _hash_files([folder / "config.json", *weight_files(folder)])


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
            files = [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
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
            remedy="copy what is missing, or save the model with save_pretrained; an adapter must be merged into its model first",
        )
    return files


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
        UserError: it is none of a causal language model, is quantised, its files are not whole, or the model fits neither the
            tokenizer nor the blocks.
    """
    folder = resolve(pretrained.source, MODEL_PATTERNS)
    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config = whole.get_text_config()
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(whole, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as exc:  # transformers raises anything from KeyError to ImportError on what it does not know
        raise UserError(
            f"{pretrained.source} is no causal language model",
            found=one_line(exc),
            expected="a config.json that AutoModelForCausalLM knows without code of its own",
            remedy="give a model of another architecture, or save this one again with save_pretrained",
        ) from exc
    if getattr(whole, "quantization_config", None) is not None:
        raise UserError(
            f"{pretrained.source} is quantised",
            found=f"quantization_config {dict(whole.quantization_config).get('quant_method', '')}".strip(),
            expected="weights in float32, bfloat16 or float16, which can be trained",
            remedy="give the model from which it was quantised",
        )
    check_fits(config, vocabulary, block_tokens)
    headers = _headers(pretrained.source, weight_files(folder))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = [name for name, (_, shape) in headers.items() if shapes.get(name, shape) != shape]
    if mismatched:
        raise do_not_match(pretrained.source, {"mismatched": sorted(mismatched)})
    check_reads_if_small(config, block_tokens, pretrained.source)
    if _has_own_head(model, headers):  # transformers unties them too, whatever the configuration says
        config.tie_word_embeddings = False
    return plain_config(config)


def _has_own_head(model: "PreTrainedModel", headers: "_Headers") -> bool:
    """Whether the files hold an output head of other values than the embeddings, to which the configuration ties it."""
    for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if one in headers and other in headers:
            with safe_open(headers[one][0], "pt") as first, safe_open(headers[other][0], "pt") as second:
                if not torch.equal(first.get_tensor(one), second.get_tensor(other)):
                    return True
    return False


_Headers: TypeAlias = Mapping[str, tuple[Path, list[int]]]
"""File and shape of each stored tensor."""


def _headers(source: str, files: Sequence[Path]) -> dict[str, tuple[Path, list[int]]]:
    """The tensors of safetensors files, which must be as long as their headers say."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: (file, opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as exc:
            raise unreadable(source, f"{file.name}: {one_line(exc)}") from exc
    return found


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
