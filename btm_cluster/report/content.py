"""Values: what an HTML page of ours consists of. Knows neither HTML nor where the numbers come from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

COLOURS = 8
"""Colours that a page has for experts and systems; the last is grey, for all that have none of their own."""


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    kind: ClassVar[str] = "paragraph"
    text: str
    is_note: bool = False


@dataclass(frozen=True)
class Table:
    """A table of strings, whose first column names the row. Columns can be sorted in a browser."""

    kind: ClassVar[str] = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Collection[int] = ()
    """Rows that the reader should see first."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a name and the number of its colour."""

    name: str
    colour: int


@dataclass(frozen=True)
class Figure:
    """A drawing, and the numbers that it is made from."""

    kind: ClassVar[str] = "figure"
    svg: str
    caption: str
    data: Table
    keys: Sequence[Key] = ()
    shows_data: bool = False
    """Whether the numbers are unfolded."""
    file: str = ""
    """Its name beside a Markdown page."""


@dataclass(frozen=True)
class Figures:
    """Drawings side by side where there is room, with one legend."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]
    keys: Sequence[Key]


@dataclass(frozen=True)
class Token:
    """A token of an excerpt, in the colour of the expert with the largest share."""

    text: str
    tip: str
    colour: int
    strength: int
    """1 to 3."""


@dataclass(frozen=True)
class Excerpt:
    """A piece of a document, coloured by expert."""

    kind: ClassVar[str] = "excerpt"
    heading: str
    tokens: Sequence[Token]
    data: Table
    keys: Sequence[Key]
    is_folded: bool = False


@dataclass(frozen=True)
class Listing:
    """Text that is shown as it stands."""

    kind: ClassVar[str] = "listing"
    name: str
    text: str


Block: TypeAlias = Paragraph | Table | Figure | Figures | Excerpt | Listing


@dataclass(frozen=True)
class Section:
    """A part of a page; its identifier is the anchor that the contents link to."""

    identifier: str
    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A number that is to be seen first: of what, how much, and what else belongs to it."""

    name: str
    value: str
    detail: str
    is_good: bool | None = None


@dataclass(frozen=True)
class Page:
    """A whole page: the outcome, the numbers behind it, and sections in order."""

    title: str
    headline: str
    is_good: bool | None
    """Whether the headline is good news; None where it is neither."""
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    footer: str


def not_measured(identifier: str, heading: str, why: str) -> Section:
    """A section of which there is nothing to show."""
    return Section(identifier, heading, (Paragraph(why, is_note=True),))
