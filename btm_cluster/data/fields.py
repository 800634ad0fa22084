"""The fields of a file's rows that hold their text or messages, guessed from the first of them."""

import csv
import json
import zlib
from collections.abc import Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from btm_cluster.data.conversations import BadMessages, conversation_of
from btm_cluster.data.streams import open_random, open_stream
from btm_cluster.plan.kinds import SEPARATORS, ending, kind_of
from btm_cluster.plan.text_rules import DEFAULT_FIELD

_LONGEST_ROW_BYTES = 1 << 24
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("question", "answer"))
"""Names that data sets give to a prompt and its completion."""


def field_with_text(path: str) -> str | None:
    """The field `text` where the first row has one, else the longest text in it; None where there are no rows,
    or none that can be read: reading the file says why."""
    row = _first_row_or_none(path)
    if row is None:
        return None
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    return (
        DEFAULT_FIELD
        if DEFAULT_FIELD in texts
        else max(texts, key=lambda name: len(texts[name]), default=None)
    )


def fields_with_messages(path: str) -> tuple[str, ...]:
    """The field with messages, or else the two with a prompt and its completion, of the first row; none where
    there are none, or it has a field `text`."""
    row = _first_row_or_none(path) or {}
    if isinstance(row.get(DEFAULT_FIELD), str | bytes):  # bytes, as Parquet may store text
        return ()
    for name, value in row.items():
        try:
            conversation_of([value], [name])
        except BadMessages:
            continue
        return (name,)
    return next((pair for pair in _PAIRS if all(isinstance(row.get(name), str) for name in pair)), ())


def _first_row_or_none(path: str) -> Mapping[str, Any] | None:
    try:
        return _first_row(path)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error, pyarrow.ArrowException):
        return None


def _first_row(path: str) -> Mapping[str, Any]:
    kind = kind_of(path)
    if kind == "Parquet":
        with open_random(path)[0] as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1):
                return dict(batch.to_pylist()[0])
    if kind not in ("JSON lines", "table"):
        return {}
    with open_stream(path) as stream:
        lines = [stream.readline(_LONGEST_ROW_BYTES).decode("utf-8-sig") for _ in range(2)]
    if kind == "table":
        head, first = csv.reader(lines, delimiter=SEPARATORS[ending(path)])
        return dict(zip(head, first, strict=False))
    row = json.loads(lines[0])
    return row if isinstance(row, dict) else {}
