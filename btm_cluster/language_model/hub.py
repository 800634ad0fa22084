"""Pushes folders to the Hugging Face hub, by the token of its usual environment; what the hub would refuse is
refused before a folder is written.

Knows huggingface_hub and its errors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from btm_cluster.errors import BtmError, UserError, one_line

WEIGHT_FILES = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
]
"""Deleted from a repository as new ones come: transformers would open old ones of other names."""


def check_push(repositories: Sequence[str], public: bool) -> None:
    """Checks the names, the token, and that it may write there. Writes nothing.

    Raises:
        UserError: a name that is none, no token, a token that the hub refuses or that only reads, an owner
            that it is not of, or a public repository where a private one is wanted.
    """
    if not repositories:
        return
    for repository in repositories:
        _check_name(repository)
    user = _whoami()
    owners = [str(user["name"]), *(str(one["name"]) for one in user.get("orgs", ()))]
    for repository in repositories:
        owner = repository.partition("/")[0]
        if owner not in owners:
            raise UserError(
                f"the hub's token is not of {owner}",
                found=f"a token of {', '.join(owners)}",
                remedy="name one of these as the owner, or give the token of another account in HF_TOKEN",
            )
        if not public and _is_public(repository):
            raise UserError(
                f"the repository {repository} is public",
                expected="a private one, or none yet",
                remedy="choose another name, or say --public",
            )


def push(folder: Path, repository: str, public: bool) -> str:
    """Creates the repository where it is not there, uploads the folder as one commit; returns its address.

    Raises:
        BtmError: the hub refused it, or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="btm export",
            delete_patterns=WEIGHT_FILES,
        )
    except Exception as exc:  # of the hub, its HTTP library and its upload library
        raise BtmError(
            f"{folder} was not pushed to {repository}",
            found=one_line(exc),
            remedy=f"the folder is there; `hf upload {repository} {folder}` tries again",
        ) from exc
    return str(url)


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(
            "--push-to-hub names no repository", found=repository, expected="OWNER/NAME, as the hub spells it"
        )


def _whoami() -> dict[str, Any]:
    try:
        user: dict[str, Any] = HfApi().whoami()
    except LocalTokenNotFoundError as exc:
        raise UserError(
            "there is no token for the hub",
            expected="HF_TOKEN in the environment, or that of `hf auth login`",
            remedy="make one that may write at https://huggingface.co/settings/tokens",
        ) from exc
    except HfHubHTTPError as exc:
        raise UserError(
            "the hub refused the token",
            found=one_line(exc),
            remedy="give a valid one in HF_TOKEN, or by `hf auth login`",
        ) from exc
    except Exception as exc:  # of the HTTP library
        raise _unreachable(exc) from exc
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            "the hub's token may only read",
            expected="one that may write",
            remedy="make one at https://huggingface.co/settings/tokens",
        )
    return user


def _is_public(repository: str) -> bool:
    try:
        return not HfApi().model_info(repository).private
    except RepositoryNotFoundError:
        return False
    except Exception as exc:  # of the hub, or of the HTTP library
        raise _unreachable(exc) from exc


def _unreachable(exc: Exception) -> UserError:
    return UserError(
        "the hub did not answer",
        found=one_line(exc),
        remedy="check whether this machine reaches it, and HF_ENDPOINT and HF_HUB_OFFLINE in the environment",
    )
