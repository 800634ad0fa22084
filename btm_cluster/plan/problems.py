"""Words for what is wrong in a plan: field, found, expected, remedy, one entry per problem.

Knows pydantic's error records; of what the fields mean it knows only what their descriptions say.
"""

import difflib
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from btm_cluster.plan.broken_rules import BROKEN_RULE
from btm_cluster.plan.synonyms import synonym_of

Location = Sequence[str | int]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def describe_problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One text per problem in `error`, for a plan of the class `root`."""
    records = [dict(record) for record in error.errors(include_url=False)]
    # A list whose entries are all wrong counts as empty for pydantic; only one that was written empty is.
    records = [
        r for r in records if not (r["type"] == "too_short" and isinstance(r["input"], list) and r["input"])
    ]
    return list(dict.fromkeys(_describe(record, root) for record in records))


def _describe(record: Mapping[str, Any], root: type[BaseModel]) -> str:
    location, kind = record["loc"], record["type"]
    where, section = _path(location) or "(the plan)", _section_at(root, location[:-1])
    if kind == BROKEN_RULE:
        parts = record["ctx"]
        return _entry(where, parts["found"], parts["expected"], parts["remedy"])
    if kind == "extra_forbidden":
        remedy = (
            _elsewhere(location, root)
            or _other_name(location, root)
            or _nearest(str(location[-1]), section.model_fields)
            or f"known here: {', '.join(section.model_fields)}"
        )
        return _entry(where, "an unknown key", "a known key", remedy)
    if kind == "invalid_key":
        return _entry(
            where, f"the key {_shown(location[-1])}", "a name", "write the key in quotes, or correct it"
        )
    names = [part for part in location if isinstance(part, str)]
    field = _section_at(root, names[:-1]).model_fields.get(names[-1]) if names else None
    if kind == "missing" and isinstance(location[-1], int):
        return _entry(where, "nothing", "a value", "add one to the list")
    if kind == "missing":
        return _entry(where, "nothing", _description(field) or "a value", f"add `{location[-1]}: …`")
    return _entry(where, _shown(record["input"]), _expectation(record, root), _remedy(record, field))


def _entry(where: str, found: str, expected: str, remedy: str) -> str:
    return f"- {where}\n    found:    {found}\n    expected: {expected}\n    remedy:   {remedy}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "keys " + ", ".join(map(_SHORT.repr, value)) if value else "no keys"
    return "nothing" if value is None else _SHORT.repr(value)


def _expectation(record: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Pydantic's words, but for what it says in Python's."""
    kind, location = record["type"], record["loc"]
    if kind in ("model_type", "model_attributes_type"):
        return "keys such as " + ", ".join(list(_section_at(root, location).model_fields)[:4])
    plain = {
        "tuple_type": "a list",
        "dict_type": "keys and values",
        "string_type": "text",
        "too_short": "at least one entry",
        "string_too_short": "text that is not empty",
        "finite_number": "a finite number",
    }
    words = str(record["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return plain.get(kind, words[:1].lower() + words[1:])


def _remedy(record: Mapping[str, Any], field: FieldInfo | None) -> str:
    """The remedy for a wrong value, with the purpose of its field."""
    found = record["input"]
    if record["type"] == "string_type" and found is not None and not isinstance(found, Mapping | list):
        return f'for YAML this is no text; write it in quotes: "{found}"'
    if record["type"] == "literal_error" and (nearest := _nearest(_shown(found), _choices(field))):
        return nearest
    default, description = "", _description(field)
    if field is not None and not field.is_required():
        shown = isinstance(field.default, str | int | float)
        default = ", or leave it out" + (f" for {field.default!r}" if shown else "")
    return (
        ("give a value" if found is None else "correct it")
        + default
        + (f" ({description})" if description else "")
    )


def _choices(field: FieldInfo | None) -> list[str]:
    return (
        [] if field is None else [choice for choice in _leaves(field.annotation) if isinstance(choice, str)]
    )


def _leaves(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _leaves(argument)


def _elsewhere(location: Location, root: type[BaseModel]) -> str | None:
    """Where an unknown key is known: in sections of the section that it was written in."""
    *above, name = location
    found = [
        f"`{_path((*above, part, name))}`"
        for part, field in _section_at(root, above).model_fields.items()
        if get_origin(field.annotation) is not tuple
        and any(name in inner.model_fields for inner in _sections(field.annotation))
    ]
    return f"here it is {' or '.join(found)}" if found else None


def _other_name(location: Location, root: type[BaseModel]) -> str | None:
    """The field that another tool's name stands for, from the section where it was written if that has it."""
    *above, name = location
    known = synonym_of(str(name))
    if known is None:
        return None
    here, parts, field = _section_at(root, above), known.field.split("."), known.field
    for i in range(1, len(parts)):
        if _section_at(root, [part.removesuffix("[]") for part in parts[:i]]) is here:
            field = _path((*above, *parts[i:]))
    return f"here it is `{field}`" + (f": {known.conversion}" if known.conversion else "")


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str | None:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean `{nearest[0]}`?" if nearest else None


def _description(field: FieldInfo | None) -> str:
    """On one line, as every part of a problem is."""
    return " ".join((field.description or "").split()).rstrip(".") if field is not None else ""


def _path(location: Location) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _section_at(root: type[BaseModel], location: Location) -> type[BaseModel]:
    """The section at `location`, or the nearest above it."""
    section = root
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Plan sections named anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, tuple) or get_args(annotation):
        for argument in get_args(annotation):
            yield from _sections(argument)
