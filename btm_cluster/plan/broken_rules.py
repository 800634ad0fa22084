"""How a section of a plan is checked, and how a rule that it breaks is reported."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

BROKEN_RULE = "broken_rule"

Given = Mapping[str, Any]
"""A section as it was written, or as it was validated."""
SectionType = TypeVar("SectionType", bound=BaseModel)


class Broken(NamedTuple):
    """A rule that does not hold: at which key of the section ("" for the section
    itself), and three parts of an error."""

    at: str
    found: str
    expected: str
    remedy: str

    @property
    def words(self) -> dict[str, Any]:
        """The message as the user sees it."""
        return {"found": self.found, "expected": self.expected, "remedy": self.remedy}


Rules = Callable[[Given], Iterator[Broken]]


def check_section(
    section: type[SectionType], given: Any, validate: ModelWrapValidatorHandler[SectionType], rules: Rules
) -> SectionType:
    """A section whose fields and rules are right.

    Raises:
        ValidationError: with the problems of its fields and the rules it breaks, all at once.
    """
    problems = (
        [_details(BROKEN_RULE, (b.at,) if b.at else (), given, b.words) for b in rules(given)]
        if isinstance(given, Mapping)
        else []
    )
    try:
        value = validate(given)
    except ValidationError as exc:
        of_fields = [
            _details(r["type"], r["loc"], r["input"], r.get("ctx", {})) for r in exc.errors(include_url=False)
        ]
        raise ValidationError.from_exception_data(section.__name__, of_fields + problems) from exc
    if problems:
        raise ValidationError.from_exception_data(section.__name__, problems)
    return value


def _details(
    kind: str, location: tuple[str | int, ...], found: Any, words: dict[str, Any]
) -> InitErrorDetails:
    known = PydanticCustomError(BROKEN_RULE, "{expected}", words) if kind == BROKEN_RULE else kind
    return InitErrorDetails(type=known, loc=location, input=found, ctx=words)


def no_rules(_: Given) -> Iterator[Broken]:
    """For a section whose fields do not depend on each other."""
    return iter(())


def exactly_one(given: Given, names: tuple[str, ...], remedy: str) -> Iterator[Broken]:
    """The rule that one field of several is given, and no other of them."""
    found = [f"`{name}`" for name in names if is_given(given.get(name))]
    if len(found) != 1:
        expected = "exactly one of " + ", ".join(f"`{name}`" for name in names)
        yield Broken("", " and ".join(found) or "none", expected, "keep one of them" if found else remedy)


def is_given(value: Any) -> bool:
    """Whether a field has a value, and not an empty list."""
    return value is not None and value != () and value != []


def numbers_of(given: Given, **defaults: float) -> list[float] | None:
    """The values of some fields, or None if one of them is no number: that is a problem of its own."""
    try:
        values = [float(given.get(name, default)) for name, default in defaults.items()]
    except (TypeError, ValueError, OverflowError):
        return None
    return values if all(map(math.isfinite, values)) else None


def section_of(given: Given, name: str) -> Given:
    """A part of the plan as a mapping, as written or as validated; empty, where it is neither."""
    value = given.get(name)
    return value if isinstance(value, Mapping) else dict(value) if isinstance(value, BaseModel) else {}


def entries_of(value: Any) -> list[Any]:
    """The entries of a list; nothing, where it is none."""
    return list(value) if isinstance(value, list | tuple) else []


def field_of(section: Any, name: str) -> Any:
    """A field of a section, as written or as validated."""
    return section.get(name) if isinstance(section, Mapping) else getattr(section, name, None)
