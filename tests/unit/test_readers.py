"""Files as documents: tables, encodings, and what was once read as something else."""

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_cluster.data.documents import BadDocument
from btm_cluster.data.readers import read_file
from btm_cluster.driver.text_requests import read_requests
from btm_cluster.errors import TextError
from btm_cluster.plan import Plan, ReadingPlan, TextPlan
from btm_cluster.plan.kinds import CODECS, UNREAD, kind_of_pattern
from tests.conftest import plan_fields
from tests.reading import read, reasons, refusal, texts, zstandard

DOCUMENTS = ["first", 'second, "quoted"\nwith a line', "thïrd 😀"]


def table(rows: list[list[str]], **how: Any) -> str:
    written = io.StringIO()
    csv.writer(written, **how).writerows(rows)
    return written.getvalue()


ROWS = [["id", "body", "n"], *([str(i), text, "1"] for i, text in enumerate(DOCUMENTS))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("kind", "separator"), [(".csv", ","), (".TSV", "\t")])
def test_a_table_is_read_by_its_column_whatever_wrote_it(
    kind: str, separator: str, line_end: str, encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{kind}.gz"
    written = table(ROWS, delimiter=separator, lineterminator="\n").replace("\n", line_end)
    path.write_bytes(gzip.compress(written.encode(encoding)))
    assert texts(read(path, field="body")) == DOCUMENTS


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1), max_size=5
    )
)
def test_whatever_characters_a_table_has_they_are_read_as_they_were_written(written: list[str]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".csv") as file:
        file.write(table([["x", "text"], *(["1", text] for text in written)]).encode())
        file.flush()
        assert texts(read(file.name)) == written


BAD_ROWS = {
    b"1": "a row of more or fewer fields than the table's head",
    b"1,a,b,c": "a row of more or fewer fields than the table's head",
    b'1,"a" b,2': "a row with a quote too many or too few",
    b'1,"a\\"b",2': "a row with a quote too many or too few",
    b"1,\xff,2": "a document that is not UTF-8",
    b"1,a\0b,2": "a document with NUL characters",
    b"1,abcdefghijk,2": "a document longer than 10 characters",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=repr)
def test_a_bad_row_of_a_table_costs_only_itself_and_is_named_by_its_line(row: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text,n\n1,"be\nfore",2\n\n' + row + b"\n2,after,3\n")
    items = read(path, ReadingPlan(longest_document_characters=10))
    assert texts(items) == ["be\nfore", "after"]
    assert [item for item in items if isinstance(item, BadDocument)] == [
        BadDocument(f"{path}:5", BAD_ROWS[row])
    ]


def test_a_quote_that_is_never_closed_does_not_take_the_table_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\nbefore\n"never closed\n' + "a line\n" * 100_000)
    items = read(path, ReadingPlan(longest_document_characters=10))
    assert texts(items)[0] == "before"
    assert reasons(items)[0] == "a row longer than 65,556 characters"
    path.write_text('text\nbefore\n"never closed')
    assert reasons(read(path)) == ["a row with a quote too many or too few"]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ("id;body;n", "a table with no column 'body' (`field`) in its head: 'id;body;n'"),
        ("id,text", "a table with no column 'body' (`field`) in its head: 'id', 'text'"),
        ("body,body", "a table with 2 columns 'body' (`field`) in its head: 'body', 'body'"),
    ],
)
def test_a_table_without_the_one_column_is_one_bad_document_that_shows_its_head(
    head: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(f"{head}\n1,2\n3,4\n")
    assert reasons(read(tmp_path / "a.csv", field="body")) == [reason]


def test_empty_files_and_files_of_a_byte_order_mark_hold_nothing_and_are_no_mistake(tmp_path: Path) -> None:
    for kind in ("csv", "jsonl", "txt"):
        for mark in (b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0"):
            (tmp_path / f"a.{kind}").write_bytes(mark)
            items = read(tmp_path / f"a.{kind}")
            assert not reasons(items)
            assert not "".join(texts(items))


ENCODINGS = ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard])
def test_utf_16_and_utf_32_are_read_by_their_byte_order_mark(
    compress: Callable[[bytes], bytes], encoding: str, tmp_path: Path
) -> None:
    def put(name: str, text: str) -> Path:
        path = tmp_path / {bytes: name, gzip.compress: f"{name}.gz"}.get(compress, f"{name}.zst")
        mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
        path.write_bytes(compress((mark + text).encode(encoding)))
        return path

    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in DOCUMENTS)
    assert texts(read(put("a.jsonl", lines))) == DOCUMENTS
    assert texts(read(put("a.txt", "é 😀\r\n" * 40_000))) == ["é 😀\n" * 40_000]
    assert texts(read(put("b.txt", "\r\n--\r\n".join(DOCUMENTS)), delimiter="\n--\n")) == DOCUMENTS


def test_utf_16_that_is_broken_costs_its_document_and_one_that_is_cut_is_refused(tmp_path: Path) -> None:
    good, bad = '{"text": "good"}\n'.encode("utf-16-le"), b'{\0"\0t\0e\0x\0t\0"\0:\0"\0\x00\xd8"\0}\0\n\0'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe" + good + bad + good)
    assert (texts(read(path)), len(reasons(read(path)))) == (["good", "good"], 1)
    path.write_bytes(b"\xff\xfe" + good + b"\0")
    assert "not UTF-16, which its first bytes say" in refusal(path)
    path.write_bytes(good)
    assert not texts(read(path)), "without a mark it is refused"


def test_a_byte_order_mark_between_joined_files_is_no_part_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n\ufeff{"text": "b"}\n\ufeff\n'.encode("utf-8-sig"))
    assert (texts(read(tmp_path / "a.jsonl")), reasons(read(tmp_path / "a.jsonl"))) == (["a", "b"], [])


@pytest.mark.parametrize(
    "whole",
    [
        '[{"text": "a"},\n{"text": "b"}\n]',
        '{\n "text": "a"\n}\n',
        '[\n {"text": "a"}\n]',
        "[" + '{"text": "a"},' * 9999,
        '[{"text": "a"}, {"text": "b"}]\n',
    ],
)
def test_a_json_file_of_one_value_is_one_bad_document_that_says_so(whole: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(whole)
    found = read(tmp_path / "a.json", ReadingPlan(longest_document_characters=10))
    assert [item for item in found if not isinstance(item, BadDocument)] == []
    assert [reason.partition(",")[0] for reason in reasons(found)] in (
        ["one JSON value over several lines"],
        ["one JSON array"],
    )


def test_json_lines_of_an_old_mac_are_one_bad_document_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\r{"text": "b"}\r')
    assert reasons(read(tmp_path / "a.jsonl")) == ["JSON lines that end with CR alone: write LF or CR LF"]


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000])
def test_a_deeply_nested_line_is_one_bad_document(value: str, tmp_path: Path) -> None:
    line = f'{{"text": "a", "deep": {value}}}'
    (tmp_path / "a.jsonl").write_text(f'{{"text": "before"}}\n{line}\n{{"text": "after"}}\n')
    items = read(tmp_path / "a.jsonl")
    assert (texts(items), reasons(items)) == (["before", "after"], ["a line that is not JSON in UTF-8"])


@pytest.mark.parametrize("padding", [1, 512, 100_000])
def test_a_gzip_file_padded_with_zero_bytes_is_read_whole(padding: int, tmp_path: Path) -> None:
    member = gzip.compress(b'{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(
        member + bytes(padding) + member + gzip.compress(b"") + bytes(padding)
    )
    assert texts(read(tmp_path / "a.jsonl.gz")) == ["a", "a"]
    (tmp_path / "a.jsonl.gz").write_bytes(member + bytes(padding) + member[:-1])
    assert "a.jsonl.gz" in refusal(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(member + bytes(padding) + b"x")
    assert "a.jsonl.gz" in refusal(tmp_path / "a.jsonl.gz")


def test_zstd_with_a_window_that_memory_cannot_hold_says_so_with_a_command_that_mends_it(
    tmp_path: Path,
) -> None:
    data = b'{"text": "a"}\n'
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([(31 - 10) << 3]) + block)
    assert "zstd -d --long=31" in refusal(tmp_path / "a.jsonl.zst")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([(27 - 10) << 3]) + block)
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["a"]


PARQUET_TEXT = [
    pa.array(DOCUMENTS).dictionary_encode(),
    pa.array(DOCUMENTS, pa.large_string()).dictionary_encode(),
    pa.array([text.encode() for text in DOCUMENTS], pa.large_binary()),
    pa.array([text.encode() for text in DOCUMENTS], pa.binary_view()),
]


@pytest.mark.parametrize("column", PARQUET_TEXT, ids=lambda column: str(column.type))
def test_text_is_read_however_parquet_stores_it(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet")) == DOCUMENTS


def test_a_parquet_column_is_the_one_of_its_name(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text.raw": ["no"], "s": [{"text": "no"}], "text": ["yes"]}), tmp_path / "a.parquet"
    )
    assert texts(read(tmp_path / "a.parquet")) == ["yes"]
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet"
    )
    assert reasons(read(tmp_path / "a.parquet")) == [
        "a Parquet file with 2 columns 'text' (`field`) in its schema: 'text', 'text'"
    ]


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2"])
def test_a_file_of_a_kind_that_is_not_read_is_never_prose(packed: str) -> None:
    for end in sorted(UNREAD - (set() if packed else set(CODECS))):
        path = f"a.jsonl{end.upper()}{packed}"  # never opened: there is none
        (bad,) = read_file(path, TextPlan(name="a", text=(path,)), 100)
        assert isinstance(bad, BadDocument)
        assert f"a {end} file, which is not read" in bad.reason


@pytest.mark.parametrize("end", [".jsonlines", ".ldjson", ".ndjson.gz"])
def test_other_names_of_json_lines_are_known(end: str, tmp_path: Path) -> None:
    data = b'{"text": "a"}\n'
    (tmp_path / f"a{end}").write_bytes(gzip.compress(data) if end.endswith(".gz") else data)
    assert texts(read(tmp_path / f"a{end}")) == ["a"]


def test_files_of_kinds_that_are_not_read_are_refused_before_any_is_opened_unless_they_may_be_skipped(
    texts: dict[str, Path], tmp_path: Path
) -> None:
    fields = plan_fields(texts, tmp_path / "store")
    for name in ("a.xml", "b.xml", "c.html.gz", "d.txt"):
        (tmp_path / name).write_text("<p>")
    fields["domains"][0] |= {"text": str(tmp_path / "*")}
    (tmp_path / "store").mkdir()
    with pytest.raises(TextError, match="files that are not read") as caught:
        read_requests(Plan.model_validate(fields))
    assert [path.rpartition("/")[2] for path in caught.value.found.split(", ")] == ["c.html.gz", "a.xml"]
    assert "convert" in caught.value.remedy
    assert read_requests(Plan.model_validate(fields | {"reading": {"bad_documents": "skip"}}))


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("a/*.csv.gz", "table"),
        ("src/**/*.py", "plain text"),
        ("README", "plain text"),
        ("*.tar.gz", "unread"),
        ("x/[ab].json", "JSON lines"),
        ("*", None),
        ("**", None),
        ("*.gz", None),
        ("data/*.json*", None),
        ("part-?", None),
    ],
)
def test_a_pattern_tells_a_kind_only_where_all_that_it_matches_have_it(
    pattern: str, kind: str | None
) -> None:
    assert kind_of_pattern(pattern) == kind


@pytest.mark.parametrize(
    ("name", "fields"),
    [("a.txt", {"field": "body"}), ("a.jsonl", {"delimiter": "--"}), ("a.csv", {"delimiter": "--"})],
)
def test_what_can_apply_to_no_file_is_refused_once_the_files_are_known(
    name: str, fields: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("text")
    words = refusal(tmp_path / "*", **fields)
    assert f"`{next(iter(fields))}` cannot apply" in words
    (tmp_path / "b.csv").write_text("body\nb\n")
    (tmp_path / "c.txt").write_text("c--c")
    read(tmp_path / "*", ReadingPlan(bad_documents="skip"), **fields)


def test_a_delimiter_that_stands_in_no_file_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one\n\ntwo\n\nthree")
    assert "no '\\\\n\\\\n' in 2 files" in refusal(tmp_path / "*.txt", delimiter="\\n\\n")
    (tmp_path / "b.txt").write_text("one\\n\\ntwo")
    assert len(texts(read(tmp_path / "*.txt", delimiter="\\n\\n"))) == 3, "in one of them is enough"
