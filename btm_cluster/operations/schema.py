"""Every field of a plan with its default and meaning, as Markdown, from the
models themselves: `docs/reference/plan.md` is this."""

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from btm_cluster.plan.plan import Plan

OPENING = """\
# The fields of a plan

Written by `make reference` from the models themselves; do not edit. A path such as `training.updates` is the
field `updates` of the section `training`; `[]` stands for each entry of a list.
"""


def plan_reference() -> str:
    """A table for each section of a plan, in the order in which they stand in it."""
    return "\n".join([OPENING, *_tables(Plan, "", {})])


def _tables(section: type[BaseModel], path: str, shown: dict[str, str]) -> Iterator[str]:
    """The table of a section and those of the sections in it, but for what was `shown` at another path."""
    about = " ".join((section.__doc__ or "").split())
    rows = [_row(name, field) for name, field in section.model_fields.items()]
    table = "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])
    opening = f"## {f'`{path}`' if path else 'The plan'}\n\n{about}\n\n"
    if table in shown:
        yield f"{opening}The fields of `{shown[table]}`.\n"
        return
    shown[table] = path
    yield f"{opening}{table}\n"
    for name, field in section.model_fields.items():
        inner, is_list = _section_of(field.annotation)
        if inner is not None:
            yield from _tables(inner, f"{path}.{name}".lstrip(".") + "[]" * is_list, shown)


def _row(name: str, field: FieldInfo) -> str:
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_default(field)} | {meaning}{_choices(field)} |"


def _choices(field: FieldInfo) -> str:
    """A sentence on the words that a field takes, alone or beside numbers; empty where it takes any."""
    members = list(_members(field.annotation))
    words = ", ".join(f"`{member}`" for member in members if isinstance(member, str))
    if not words:
        return ""
    if int in members:
        return f" A whole number, or {words}."
    return f" {'Any' if get_origin(field.annotation) is tuple else 'One'} of {words}."


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None or field.default == ():
        return "none"
    if isinstance(field.default, BaseModel):
        return "see below"
    return f"`{json.dumps(to_jsonable_python(field.default)).strip(chr(34))}`"


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, optional or in a list, and whether it is a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in get_args(annotation):
        found, _ = _section_of(inner)
        if found is not None:
            return found, get_origin(annotation) is tuple
    return None, False


def _members(annotation: Any) -> Iterator[Any]:
    """The words that a field takes, and the types of its other values."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Union, types.UnionType, tuple):
        for inner in get_args(annotation):
            yield from _members(inner)
    elif get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif annotation not in (types.NoneType, ...):
        yield annotation
