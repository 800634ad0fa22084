"""Documents as they are read: checked, or what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow
import pyarrow.parquet

from btm_cluster.data.chat_rendering import CannotRender, render
from btm_cluster.data.conversations import BadMessages, Conversation, conversation_of
from btm_cluster.plan import ChatTemplate, TextPlan

NO_TEXT = "a row without text in the field"
WRONG_TABLE, WRONG_PARQUET = "a table with", "a Parquet file with"
TOO_LONG = "a document longer than"
NOT_UTF_8 = "a document that is not UTF-8"


@dataclass(frozen=True)
class Document:
    """A document, and the split its file was given for (None: by content hash)."""

    text: str
    """The document; of a conversation, what is said in it."""
    split: str | None = None
    conversation: Conversation | None = None


@dataclass(frozen=True)
class BadDocument:
    """Something that is not a usable document: where, and why."""

    where: str
    reason: str


Read: TypeAlias = str | Conversation | BadDocument
"""A document as its file has it."""


@dataclass
class Delimiter:
    """The delimiter that cuts text files into documents, and whether it was found in any."""

    characters: str
    occurs: bool = False


@dataclass(frozen=True)
class RowForm:
    """How a row becomes a document: by a field that holds text, or by one or two that hold messages."""

    fields: tuple[str, ...]
    longest: int
    """Characters of the longest document."""
    holds_messages: bool = False
    template: ChatTemplate | None = None
    """Each conversation is tried on it, where it is known."""

    @staticmethod
    def of(source: TextPlan, longest: int, template: ChatTemplate | None = None) -> "RowForm":
        """As a text's plan says it."""
        if source.messages is None:
            return RowForm((source.field,), longest)
        return RowForm(source.messages, longest, True, template)

    def document(self, where: str, values: Sequence[Any]) -> Read:
        """The document of a row whose fields hold `values`."""
        if not self.holds_messages:
            return checked(where, values[0], self.fields[0], self.longest)
        try:
            conversation = conversation_of(values, self.fields)
            conversation.to_json().encode()
            if self.template is not None:
                render(self.template, conversation)
        except UnicodeEncodeError:
            return BadDocument(where, NOT_UTF_8)
        except (BadMessages, CannotRender) as exc:
            return BadDocument(where, str(exc))
        text = checked(where, conversation.text, self.fields[0], self.longest)
        return text if isinstance(text, BadDocument) else conversation


def longer_than(longest: int) -> str:
    """Why a document of more characters is none."""
    return f"{TOO_LONG} {longest:,} characters"


def column_problem(start: str, columns: Sequence[str], form: RowForm) -> str:
    """Why columns of these names hold no documents, after `start`; empty where each field is one of them."""
    field = next((field for field in form.fields if columns.count(field) != 1), None)
    if field is None:
        return ""
    found = columns.count(field)
    shown = ", ".join(map(repr, columns))[:200].encode(errors="backslashreplace").decode()
    named = "messages" if form.holds_messages else "field"
    where = "head" if start == WRONG_TABLE else "schema"
    return f"{start} {found or 'no'} column{'s' * (found > 1)} {field!r} (`{named}`) in its {where}: {shown}"


def checked(where: str, text: Any, field: str, longest: int) -> str | BadDocument:
    """A document, if it is text that is neither too long nor broken."""
    if not isinstance(text, str):
        return BadDocument(where, f"{NO_TEXT} {field!r}")
    if len(text) > longest:
        return BadDocument(where, longer_than(longest))
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(where, NOT_UTF_8)
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
