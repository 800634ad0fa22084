"""The field that holds the text, guessed from a file's first row."""

import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from btm_cluster.data.fields import field_with_text, fields_with_messages

ROWS = {
    "a.jsonl": (b'{"id": "0123456789", "text": "a"}\n{"body": "b"}\n', "text"),
    "b.jsonl": (b'\xef\xbb\xbf{"id": "1", "body": "a b c", "n": 3}\n', "body"),
    "c.jsonl.gz": (gzip.compress(b'{"id": "1", "body": "a b c"}\n'), "body"),
    "d.csv": (b"id,story\n1,a b c\n", "story"),
    "e.tsv": (b"id\ttext\n123456789\ta\n", "text"),
    "f.jsonl": (b"[1]\n", None),
    "g.jsonl": (b"no JSON", None),
    "h.jsonl": (b"", None),
    "i.csv": (b"id,story\n", None),
    "j.txt": (b'{"body": "a"}', None),
    "k.jsonl.gz": (b"not compressed", None),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_field_is_text_or_the_longest_text_of_the_first_row(name: str, tmp_path: Path) -> None:
    data, field = ROWS[name]
    (tmp_path / name).write_bytes(data)
    assert field_with_text(str(tmp_path / name)) == field


def test_parquet_has_a_field_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": ["1"], "body": ["a b c"], "n": [3]}), path)
    assert field_with_text(str(path)) == "body"
    path.write_bytes(b"none")
    assert field_with_text(str(path)) is None


MESSAGES = {
    b'{"id": "1", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}': (
        "messages",
    ),
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}': (
        "conversations",
    ),
    b'{"instruction": "a", "output": "b", "source": "c"}': ("instruction", "output"),
    b'{"text": "a", "prompt": "a", "completion": "b"}': (),
    b'{"body": "a", "tags": ["b"]}': (),
    b"no JSON": (),
}


@pytest.mark.parametrize("row", MESSAGES)
def test_messages_are_told_from_the_first_row(row: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(row + b"\n")
    assert fields_with_messages(str(tmp_path / "a.jsonl")) == MESSAGES[row]
