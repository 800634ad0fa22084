"""The kinds of values in a plan: their bounds, how YAML's surprises are read, and where relative paths begin."""

import json
import os
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from btm_cluster.plan.folder import is_relative, located

PLAN_FOLDER = "folder of the plan"
"""In pydantic's context, as `opened_folder` has it: relative paths begin there. Without it, they begin in the
current folder."""
PLAN_TEXT = "text of the plan"
"""In pydantic's context: what the plan's file says."""
NAME_PATTERN = "[a-z0-9][a-z0-9_-]{0,63}"


def _as_number(value: Any) -> Any:
    """YAML reads 1e5 as text, and pydantic `true` as 1."""
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        return float(value) if isinstance(value, str) and "e" in value.lower() else value
    except ValueError:
        return value


def _number_or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One error for both: a union would name each of its members in one."""
    try:
        return validate(value)
    except ValidationError as exc:
        raise ValueError("a whole number of at least 1, or 'auto'") from exc


def _as_switch(value: Any) -> Any:
    """YAML reads a bare on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _check_name(value: str) -> str:
    if not re.fullmatch(NAME_PATTERN, value):
        raise ValueError("lower-case letters, digits, - and _, the first a letter or digit, 64 at most")
    return value


def _check_location(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("a path or name of visible characters")
    return value


def _check_file(value: str) -> str:
    if "://" in value and not value.startswith("s3://"):
        raise ValueError("a local path, or s3://bucket/key")
    return value


def _beside_plan(value: str, info: ValidationInfo) -> str:
    """A path of a plan's file as it is opened; of a plan without one it stays as it is."""
    folder = (info.context or {}).get(PLAN_FOLDER)
    if folder is None or not is_relative(value):
        return value
    return located(folder, value)


def _folder_beside_plan(value: str, info: ValidationInfo) -> str:
    """A folder beside the plan, or else the name that it is for the hub."""
    path = _beside_plan(value, info)
    return path if os.path.isdir(path) else value


def _check_plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError("plain values: text, finite numbers, true, false, and lists of them") from exc
    return value


Whole = Annotated[int, BeforeValidator(_as_number), Field(ge=0, le=10**12)]
Positive = Annotated[int, BeforeValidator(_as_number), Field(ge=1, le=10**12)]
Blocks = Annotated[Positive | Literal["auto"], WrapValidator(_number_or_auto)]
Real = Annotated[float, BeforeValidator(_as_number), Field(ge=0)]
PositiveReal = Annotated[float, BeforeValidator(_as_number), Field(gt=0)]
Share = Annotated[Real, Field(lt=1)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, AfterValidator(_check_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]
Location = Annotated[str, AfterValidator(_check_location)]
Place = Annotated[Location, AfterValidator(_beside_plan)]
FolderOrName = Annotated[Location, AfterValidator(_folder_beside_plan)]
WrittenFile = Annotated[Location, AfterValidator(_check_file)]
File = Annotated[WrittenFile, AfterValidator(_beside_plan)]
Messages = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=2)]
Files = Annotated[tuple[WrittenFile, ...], BeforeValidator(_as_tuple)]
"""As they are written: opened from the folder of the plan, which their text knows."""
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_switch)]
Modules = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Config = Annotated[dict[str, Any], AfterValidator(_check_plain)]
