"""Words for what is wrong in a plan: field, found, expected, remedy, one entry per problem.

Knows pydantic's error records and YAML; knows nothing of what the fields mean.
"""

import difflib
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError


def describe_problems(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One text per problem in `error`, for a plan of the class `root`."""
    return [_describe(dict(record), root) for record in error.errors(include_url=False)]


def _describe(record: dict[str, Any], root: type[BaseModel]) -> str:
    location = record["loc"]
    field = _path(location) or "(the plan)"
    if record["type"] == "extra_forbidden":
        known = _known_names(root, location[:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean `{nearest[0]}`?" if nearest else f"known here: {', '.join(known)}"
        return _entry(field, "an unknown key", "a known key", remedy)
    if record["type"] == "missing":
        return _entry(field, "nothing", "a value", f"add `{location[-1]}`")
    expected = record["msg"].removeprefix("Value error, ")
    found = record["input"]
    shown = "keys " + ", ".join(map(str, found)) if isinstance(found, dict) else repr(found)
    return _entry(field, _short(shown), expected[:1].lower() + expected[1:], "change the value")


def _entry(field: str, found: str, expected: str, remedy: str) -> str:
    return f"- {field}\n    found:    {found}\n    expected: {expected}\n    remedy:   {remedy}"


def _short(text: str, longest: int = 120) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _path(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def _known_names(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Field names of the section at `location`."""
    section = root
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Plan sections named anywhere in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, tuple) or get_args(annotation):
        for argument in get_args(annotation):
            yield from _sections(argument)


def name_problems(raw: dict[str, Any]) -> list[str]:
    """Names used twice over domains and targets; works on plans with other errors too, so all are shown at once."""
    texts = [text for part in ("domains", "targets") for text in _entries(raw.get(part))]
    counts = Counter(text["name"] for text in texts if isinstance(text, dict) and isinstance(text.get("name"), str))
    return [
        _entry("domains, targets", f"the name {name!r} {count} times", "every name once", "rename all but one")
        for name, count in counts.items()
        if count > 1
    ]


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def unique_key_loader() -> type[yaml.SafeLoader]:
    """A YAML loader that refuses a key written twice, which plain YAML loaders let the later one win."""

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [str(key) for key, count in Counter(map(str, keys)).items() if count > 1]
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{twice[0]}` stands twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader
