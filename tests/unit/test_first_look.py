"""A first look into a text's files refuses what reading refuses, in the same words, and takes a moment."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btm_cluster.data.corpus import write_text
from btm_cluster.data.first_look import HEAD_BYTES, MOST_FILES, SMALL_BYTES, Unread, look_into
from btm_cluster.errors import TextError
from btm_cluster.plan import ReadingPlan, TextPlan

ROWS = "".join(json.dumps({"text": f"the document {i} of many"}) + "\n" for i in range(50))
LARGE = "a line of a book that goes on\n" * (SMALL_BYTES // 10)
WRONG: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "Latin-1": ({"a.txt": "héllo\n".encode("latin-1") * 40}, {}),
    "Latin-1 in rows": ({"a.jsonl": ROWS.encode() + '{"text": "é"}\n'.encode("latin-1")}, {}),
    "Latin-1 in one of large files": ({"a.txt": LARGE[:900_000].encode(), "b.txt": b"h\xe9 " * 100_000}, {}),
    "Latin-1 between delimiters": (
        {"a.txt": b"one\n--\nh\xe9\n--\n" + LARGE.encode()},
        {"delimiter": "--\n"},
    ),
    "one line": ({"a.txt": b"one line\n"}, {}),
    "nothing": ({"a.txt": b""}, {}),
    "one row": ({"a.jsonl": b'{"text": "one"}\n'}, {}),
    "no field": ({"a.jsonl": ROWS.encode() * 40}, {"field": "body"}),
    "a book": ({"a.txt": LARGE[:1_500_000].encode()}, {}),
    "a long book": ({"a.txt": LARGE.encode() * 2}, {}),
    "what is not gzip": ({"a.jsonl.gz": ROWS.encode()}, {}),
}


def written(folder: Path, files: dict[str, bytes], **fields: Any) -> TextPlan:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return TextPlan(name="a", text=(f"{folder}/*",), **fields)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(TextError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_reading_refuses_is_refused_in_the_same_words(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    files, fields = WRONG[wrong]
    source, reading = written(tmp_path / "text", files, **fields), ReadingPlan()
    by_reading = refusal(lambda: write_text(source, reading, False, tmp_path))
    assert refusal(lambda: look_into([Unread(source, reading, False)])) == by_reading


def test_all_texts_are_looked_at_before_any_is_refused(tmp_path: Path) -> None:
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources.append(written(tmp_path / name, {"a.txt": b"\xff"}))
    said = refusal(lambda: look_into(Unread(source, ReadingPlan(), False) for source in sources))
    assert said.startswith("2 texts cannot be read")


def test_a_text_of_fewer_bytes_than_a_block_has_tokens_fills_none(tmp_path: Path) -> None:
    source = written(tmp_path, {"a.jsonl": b"".join(b'{"text": "%d"}\n' % i for i in range(3))})
    texts = [Unread(source, ReadingPlan(), False)]
    look_into(texts, block_tokens=3)
    assert "the train text of 'a' fills no block" in refusal(lambda: look_into(texts, block_tokens=4))


def test_of_large_texts_little_is_read(tmp_path: Path) -> None:
    """What is bad further on is found by the run."""
    rest = SMALL_BYTES // 1000
    files = {f"{i:04}.txt": b"text\n" * rest for i in range(MOST_FILES)}
    late = {"!first.txt": b"text\n" * HEAD_BYTES + b"\xff", "last.txt": b"\xff"}
    source, reading = written(tmp_path, files | late), ReadingPlan()
    look_into([Unread(source, reading, False)])
    assert "not UTF-8" in refusal(lambda: write_text(source, reading, False, tmp_path.parent))
