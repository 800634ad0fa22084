"""Readers of files, one for each kind: a file becomes documents, one at a time,
and what is bad costs only itself.

JSON lines are read here, one by one: other readers take a chunk at a time, which one broken line spoils and
one monstrous line fills. Knows nothing of splits, duplicates or tokens.
"""

import codecs
import csv
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from btm_cluster.data.documents import (
    WRONG_PARQUET,
    WRONG_TABLE,
    BadDocument,
    Delimiter,
    Read,
    RowForm,
    cell_value,
    checked,
    column_problem,
    longer_than,
)
from btm_cluster.data.files import S3, is_lost, readable
from btm_cluster.data.streams import Budget, Count, open_random, open_stream
from btm_cluster.errors import TextError, one_line
from btm_cluster.plan import ChatTemplate, TextPlan
from btm_cluster.plan.kinds import CONVERT, SEPARATORS, ending, kind_of

_CHUNK_CHARACTERS = 1 << 20
_PARQUET_ROWS = 64
_NOT_JSON, _LONG_LINE = "a line that is not JSON in UTF-8", "a line longer than"
_NO_JSON = object()
_UTF_8_MARK = b"\xef\xbb\xbf"


def read_file(
    path: str,
    source: TextPlan,
    longest: int,
    delimiter: Delimiter | None = None,
    budget: Budget | None = None,
    count: Count | None = None,
    template: ChatTemplate | None = None,
    head_bytes: int | None = None,
) -> Iterator[Read]:
    """The documents of a file; of plain text those in its first `head_bytes` where they are given, the last of
    them cut short.

    A budget is for one that is not trusted: its bytes are counted, no link is followed. Messages are tried on
    the template.

    Raises:
        TextError: it cannot be read to its end.
    """
    where, kind, form = readable(path), kind_of(path), RowForm.of(source, longest, template)
    if kind == "unread":
        yield BadDocument(where, f"a {ending(path)} file, which is not read: {CONVERT}")
        return
    if not path.startswith(S3) and is_lost(path):
        yield BadDocument(where, "a link that leads nowhere")
        return
    try:
        if kind == "Parquet":
            yield from _read_parquet(where, path, form, count)
            return
        with open_stream(path, budget, count) as stream:
            if kind == "JSON lines":
                yield from _read_json_lines(where, stream, form)
            elif kind == "table":
                yield from _read_table(where, stream, form, SEPARATORS[ending(path)])
            else:
                plain = stream if head_bytes is None else _head(stream, head_bytes)
                yield from _read_plain(where, plain, delimiter, longest)
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as exc:
        raise _unreadable(source.name, where, exc) from exc


def _unreadable(name: str, where: str, exc: Exception) -> TextError:
    if "too much memory" in str(exc):  # as Arrow passes on what zstd says; the program zstd says the rest
        return TextError(
            f"cannot read the text of {name!r}",
            found=f"{where}: compressed by `zstd --long` with a window of more than 128 MiB",
            expected="a window that can be held in memory, of at most 128 MiB (`--long=27`)",
            remedy="compress it again: `zstd -d --long=31 --stdout FILE | zstd -o NEW-FILE`",
        )
    return TextError(
        f"cannot read the text of {name!r}",
        found=f"{where}: {one_line(exc)}",
        expected="a whole file of the kind that its name says",
        remedy="mend or replace the file",
    )


def _read_json_lines(path: str, stream: io.BufferedReader, form: RowForm) -> Iterator[Read]:
    # A character takes at most 12 bytes in JSON (\ud83d\ude00); the rest is room for other fields.
    longest_bytes = 12 * form.longest + (1 << 16)
    number, is_first = 0, True
    while line := stream.readline(longest_bytes + 1):
        number += 1
        where = f"{path}:{number}"
        stripped = line.removeprefix(_UTF_8_MARK).strip()  # files with a mark may have been joined
        if not stripped:
            continue
        if len(line) > longest_bytes:
            item: Read = BadDocument(where, f"{_LONG_LINE} {longest_bytes:,} bytes")
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
        else:
            item = _document_of(where, stripped, form)
        if is_first and isinstance(item, BadDocument) and (reason := _whole_file(stripped, item)):
            yield BadDocument(path, reason)
            return
        is_first = False
        yield item


def _document_of(where: str, line: bytes, form: RowForm) -> Read:
    row = _parsed(line)
    if row is _NO_JSON:
        return BadDocument(where, _NOT_JSON)
    if not isinstance(row, dict):
        return BadDocument(where, "a line that is not a JSON object")
    return form.document(where, [row.get(field) for field in form.fields])


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return _NO_JSON


def _whole_file(first: bytes, item: BadDocument) -> str:
    """Why a file whose first line is bad has no JSON lines at all; empty, where others may be good."""
    if item.reason != _NOT_JSON and not item.reason.startswith(_LONG_LINE):
        rows = _parsed(first)
        if isinstance(rows, list) and any(isinstance(row, dict) for row in rows):
            return "one JSON array, not an object on each line: convert it, such as by `jq -c '.[]'`"
        return ""  # a line of JSON, and not the right one
    before, carriage_return, _ = first.partition(b"\r")
    if carriage_return and isinstance(_parsed(before), dict):
        return "JSON lines that end with CR alone: write LF or CR LF"
    if first.startswith(b"[") or first == b"{":
        return "one JSON value over several lines, not one on each: convert it, such as by `jq -c '.[]'`"
    return ""


class _RowTooLong(Exception):
    pass


class _Lines:
    """A table's lines, of which a row takes one, or several where a line end stands in quotes."""

    def __init__(self, text: io.TextIOWrapper, longest_row: int) -> None:
        self._text, self._longest = text, longest_row
        self._left = longest_row
        self.number = 0

    def begin_row(self) -> None:
        self._left = self._longest

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            while line and not line.endswith("\n"):
                line = self._text.readline(_CHUNK_CHARACTERS)
            raise _RowTooLong
        return line


def _read_table(path: str, stream: io.BufferedReader, form: RowForm, separator: str) -> Iterator[Read]:
    """Columns of a table with a head, as spreadsheets write it."""
    head: list[str] = []
    with _as_text(stream) as text:
        for where, row in _rows(path, text, separator, form.longest):
            if isinstance(row, BadDocument):
                yield row
            elif head:
                yield _row_of(where, row, head, form)
            elif reason := column_problem(WRONG_TABLE, row, form):
                yield BadDocument(path, reason)
                return
            else:
                head = row


def _rows(
    path: str, text: io.TextIOWrapper, separator: str, longest: int
) -> Iterator[tuple[str, list[str] | BadDocument]]:
    """The rows that are not empty, each with its place."""
    # All may be quotes, which stand twice; the rest is for other columns.
    longest_row = 2 * longest + (1 << 16)
    csv.field_size_limit(max(csv.field_size_limit(), longest_row))
    lines = _Lines(text, longest_row)
    rows = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        lines.begin_row()
        where = f"{path}:{lines.number + 1}"
        try:
            row = next(rows, None)
        except csv.Error:
            yield where, BadDocument(where, "a row with a quote too many or too few")
        except _RowTooLong:
            yield where, BadDocument(where, f"a row longer than {longest_row:,} characters")
        else:
            if row is None:
                return
            if row:
                yield where, row


def _row_of(where: str, row: list[str], head: list[str], form: RowForm) -> Read:
    if len(row) != len(head):
        return BadDocument(where, "a row of more or fewer fields than the table's head")
    cells = [row[head.index(field)] for field in form.fields]
    if any("\0" in cell for cell in cells):
        return BadDocument(where, "a document with NUL characters")
    return form.document(where, cells)


def _read_plain(
    path: str, stream: io.BufferedReader, delimiter: Delimiter | None, longest: int
) -> Iterator[str | BadDocument]:
    """Whole files, or their parts; line ends become \\n."""
    cut = delimiter.characters.replace("\r\n", "\n").replace("\r", "\n") if delimiter else None
    held, too_long, part = "", False, 0

    def finish(piece: str) -> str | BadDocument:
        nonlocal part, too_long
        part, was_too_long, too_long = part + 1, too_long, False
        where = f"{path}, document {part}" if cut else path
        if was_too_long:
            return BadDocument(where, longer_than(longest))
        return BadDocument(where, "a binary file") if "\0" in piece else checked(where, piece, "", longest)

    with _as_text(stream) as text:
        while chunk := text.read(_CHUNK_CHARACTERS):
            *whole, held = (held + chunk).split(cut) if cut else [held + chunk]
            if delimiter and whole:
                delimiter.occurs = True
            for piece in whole:
                yield finish(piece)
            if len(held) > longest + len(cut or ""):
                # Kept short, but long enough that a delimiter across two chunks is still seen.
                held, too_long = held[-len(cut or " ") :], True
    yield finish(held)


def _head(stream: io.BufferedReader, size: int) -> io.BufferedReader:
    head = stream.read(size)
    if len(head) == size:  # which may end within a character
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        decoder.decode(head)
        head = head.removesuffix(decoder.getstate()[0])
    return io.BufferedReader(io.BytesIO(head))


def _as_text(stream: io.BufferedReader) -> io.TextIOWrapper:
    """With every line end as \\n.

    What is not UTF-8 becomes surrogates, so that it costs only the document it stands in.
    """
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")


def _read_parquet(where: str, path: str, form: RowForm, count: Count | None) -> Iterator[Read]:
    stream, ahead = open_random(path)
    # Buffered in pieces: by default pyarrow holds the whole column of a row group, which may be the whole
    # file.
    with stream, pyarrow.parquet.ParquetFile(stream, buffer_size=ahead, pre_buffer=False) as file:
        names = file.schema_arrow.names
        if reason := column_problem(WRONG_PARQUET, names, form):
            yield BadDocument(where, reason)
            return
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(form.fields)):
            # By name: asked for `a`, pyarrow also reads a column `a.b`.
            for cells in zip(*(batch.column(field) for field in form.fields), strict=True):
                number += 1
                values = [cell_value(cell, form.longest) for cell in cells]
                yield form.document(f"{where}, row {number}", values)
            if count is not None:  # as if all rows were as long
                count(stream.size() * len(batch) // file.metadata.num_rows)
