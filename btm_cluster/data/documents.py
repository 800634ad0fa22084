"""Documents as they are read: checked, or what is wrong with them."""

from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

NO_TEXT = "a row without text in the field"


@dataclass(frozen=True)
class BadDocument:
    """Something that is not a usable document: where, and why."""

    where: str
    reason: str


@dataclass
class Delimiter:
    """The delimiter that cuts text files into documents, and whether it was found in any."""

    characters: str
    occurs: bool = False


def checked(where: str, text: Any, field: str, longest: int) -> str | BadDocument:
    """A document, if it is text that is neither too long nor broken."""
    if not isinstance(text, str):
        return BadDocument(where, f"{NO_TEXT} {field!r}")
    if len(text) > longest:
        return BadDocument(where, f"a document longer than {longest} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(where, "a document that is not UTF-8")
    return text


def cell_value(cell: pyarrow.Scalar, longest: int) -> Any:
    """A cell of a column as a Python value: no more of a monstrous one than shows that it is too long."""
    if isinstance(cell, pyarrow.DictionaryScalar):
        cell = cell.value
    if not isinstance(cell, pyarrow.BinaryScalar) or not cell.is_valid:
        return cell.as_py()
    data = cell.as_buffer()
    # A character takes at most 4 bytes.
    return data[: 4 * longest + 1].to_pybytes().decode(errors="surrogateescape")
