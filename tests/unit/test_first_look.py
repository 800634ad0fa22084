"""A first look into a text's files refuses what reading refuses, in the same words, and takes a moment."""

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from btm_cluster.data import first_look
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


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, "zstd", asbytes=True))


def parquet(columns: dict[str, list[Any]]) -> bytes:
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), packed)
    return packed.getvalue()


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


ROW = json.dumps({"text": "語" * 40}, ensure_ascii=False)
PLAIN = "語言🙂é\r\n" * 5
PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstd}
RIGHT: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "one line of many bytes to a character": ({f"{i}.txt": f"{i}語".encode() * 20 for i in range(3)}, {}),
    "a delimiter": ({"a.txt": "語é一--二🙂--三語".encode()}, {"delimiter": "--"}),
    "a delimiter in one file of three": (
        {f"{i}.txt": f"{i}語é一".encode() for i in "ab"} | {"c.txt": "二--三".encode()},
        {"delimiter": "--"},
    ),
    "a delimiter of a line": ({"a.txt": "語\r\n--\r\n一\r\n--\r\n二".encode()}, {"delimiter": "\n--\n"}),
    "a byte-order mark": ({f"{i}.txt": (i + PLAIN).encode("utf-8-sig") for i in "abc"}, {}),
    "UTF-16": ({f"{i}.txt": (i + PLAIN).encode("utf-16") for i in "abc"}, {}),
    "UTF-32 with long line ends": ({f"{i}.txt": ("\r\n" * 99 + i).encode("utf-32") for i in "abc"}, {}),
    "rows longer than the head": (
        {"a.jsonl": "\n".join(f"{ROW[:-2]}{i}{ROW[-2:]}" for i in "abc").encode()},
        {},
    ),
    "a table": ({"a.csv": 'text,n\r\n"語\r\n一",1\r\n二,2\r\n三,3\r\n'.encode("utf-8-sig")}, {}),
    "Parquet": ({"a.parquet": parquet({"text": ["語" * 40, "一", "二"], "prompt": list("abc")})}, {}),
    "text as bytes beside messages": (
        {
            "a.parquet": parquet(
                {"text": [b"a", b"b", b"c"], "prompt": list("abc"), "completion": list("abc")}
            )
        },
        {},
    ),
    **{
        f"plain text in {end}": ({f"{i}.txt.{end}": pack((i + PLAIN).encode()) for i in "abc"}, {})
        for end, pack in PACKED.items()
    },
    **{
        f"rows in {end}": (
            {f"{i}.jsonl.{end}": pack(json.dumps({"text": i + PLAIN}).encode()) for i in "abc"},
            {},
        )
        for end, pack in PACKED.items()
    },
}


@pytest.mark.parametrize("right", RIGHT)
def test_what_is_read_is_not_refused_wherever_the_head_ends(
    right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of CJK were cut within a character, and so were no UTF-8."""
    (tmp_path / "text").mkdir()
    files, fields = RIGHT[right]
    source, reading = (
        written(tmp_path / "text", files, **fields),
        ReadingPlan(longest_document_characters=100),
    )
    write_text(source, reading, False, tmp_path)
    monkeypatch.setattr(first_look, "SMALL_BYTES", 0)
    for size in range(1, 64):
        monkeypatch.setattr(first_look, "HEAD_BYTES", size)
        look_into([Unread(source, reading, False)])


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
