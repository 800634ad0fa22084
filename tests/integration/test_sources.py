"""Sources: files found, opened and read as documents, local and from a real S3 server, and data sets."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btm_cluster.data.documents import BadDocument
from btm_cluster.data.sources import Document, fingerprint, read_documents
from btm_cluster.errors import TextError
from btm_cluster.plan import DatasetPlan, ReadingPlan, TextPlan
from btm_cluster.plan.values import PLAN_FOLDER
from tests.reading import read, reasons, refusal, texts, zstandard

DOCUMENTS = ["first", "second\nwith a line", "thïrd 😀"]
JSON_LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstandard,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".JSONL", ".ndjson", ".json"])
def test_json_lines_are_read_plain_and_compressed(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](JSON_LINES))
    assert texts(read(path)) == DOCUMENTS


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".py", ""])
def test_any_other_file_is_a_document(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(COMPRESSIONS[suffix]("\ufeffa b\r\nc".encode()))
    assert texts(read(path)) == ["a b\nc"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()], ids=str)
def test_parquet_rows_are_documents(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array([text.encode() if kind == pa.binary() else text for text in DOCUMENTS], kind)
    pq.write_table(pa.table({"body": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert texts(read(tmp_path / "a.parquet", field="body")) == DOCUMENTS


@pytest.mark.parametrize("compress", [gzip.compress, zstandard])
def test_a_compressed_file_of_several_members_is_read_to_its_end(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / ("a.jsonl.gz" if compress is gzip.compress else "a.jsonl.zst")
    path.write_bytes(compress(JSON_LINES) + compress(JSON_LINES))
    assert texts(read(path)) == DOCUMENTS * 2


@pytest.mark.parametrize("delimiter", ["\n---\n", "\r\n---\r\n", "\r---\r", "<|end|>"])
def test_a_delimiter_cuts_text_files_into_documents_wherever_chunks_end(
    delimiter: str, tmp_path: Path
) -> None:
    written = [f"document {i} " + "x" * (700_000 - i) for i in range(5)]
    (tmp_path / "a.txt").write_bytes(delimiter.join(written).encode())
    assert texts(read(tmp_path / "a.txt", delimiter=delimiter)) == written


def test_a_document_over_the_limit_costs_only_itself(tmp_path: Path) -> None:
    reading = ReadingPlan(longest_document_characters=10)
    (tmp_path / "a.txt").write_text("ab--" + "x" * 3_000_000 + "--cd--" + "y" * 11)
    items = read(tmp_path / "a.txt", reading, delimiter="--")
    assert texts(items) == ["ab", "cd"]
    assert reasons(items) == ["a document longer than 10 characters"] * 2
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "x" * 11}) + "\n" + json.dumps({"text": "😀" * 10}) + "\n"
    )
    items = read(tmp_path / "a.jsonl", reading)
    assert (texts(items), len(reasons(items))) == (["😀" * 10], 1)
    pq.write_table(pa.table({"text": ["x" * 11, "😀" * 10, "😀" * 11]}), tmp_path / "a.parquet")
    items = read(tmp_path / "a.parquet", reading)
    assert (texts(items), len(reasons(items))) == (["😀" * 10], 2)


BAD_LINES = {
    b"not json": "a line that is not JSON in UTF-8",
    b'{"text": "a': "a line that is not JSON in UTF-8",
    b'{"text": "\xff"}': "a line that is not JSON in UTF-8",
    b"\x1f\x8b\x08\x00": "a line that is not JSON in UTF-8",
    b"[" * 100_000: "a line that is not JSON in UTF-8",
    b"[1]": "a line that is not a JSON object",
    b"null": "a line that is not a JSON object",
    b'{"txt": "a"}': "a row without text in the field 'text'",
    b'{"text": null}': "a row without text in the field 'text'",
    b'{"text": 3}': "a row without text in the field 'text'",
    b'{"text": "\\ud800"}': "a document that is not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:20]))
def test_a_bad_line_costs_only_itself_and_is_named_by_its_place(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "before"}\r\n\n' + line + b'\n{"text": "after"}')
    items = read(path)
    assert texts(items) == ["before", "after"]
    assert [item for item in items if isinstance(item, BadDocument)] == [
        BadDocument(f"{path}:3", BAD_LINES[line])
    ]


def test_what_is_not_utf_8_in_a_text_file_costs_only_its_own_document_compressed_or_not(
    tmp_path: Path,
) -> None:
    data = b"--".join([b"good", b"bad \xff", b"x" * 2_000_000, b"good too"])
    for suffix, compress in COMPRESSIONS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(data))
        items = read(path, ReadingPlan(longest_document_characters=5_000_000), delimiter="--")
        assert [len(text) for text in texts(items)] == [4, 2_000_000, 8]
        assert reasons(items) == ["a document that is not UTF-8"]


def test_binary_files_under_a_text_name_are_bad_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 10)
    assert reasons(read(tmp_path / "a.txt")) == ["a binary file"]
    (tmp_path / "a.jsonl").write_bytes(bytes(range(1, 256)) * 10)
    assert set(reasons(read(tmp_path / "a.jsonl"))) == {"a line that is not JSON in UTF-8"}


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.jsonl.xz", "a.PDF", "a.tgz"])
def test_an_archive_is_a_bad_document_that_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"whatever")
    assert "which is not read: unpack it, or convert it" in reasons(read(tmp_path / name))[0]


def test_parquet_cells_that_are_no_text_cost_only_themselves(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"text": ["a", None, "b"], "n": [1, 2, 3], "s": [{"x": 1}] * 3}), tmp_path / "a.parquet"
    )
    items = read(tmp_path / "a.parquet")
    assert (texts(items), reasons(items)) == (["a", "b"], ["a row without text in the field 'text'"])
    assert len(reasons(read(tmp_path / "a.parquet", field="n"))) == 3
    assert len(reasons(read(tmp_path / "a.parquet", field="s"))) == 3
    assert reasons(read(tmp_path / "a.parquet", field="body")) == [
        "a Parquet file with no column 'body' (`field`) in its schema: 'text', 'n', 's'"
    ]


def test_parquet_text_that_is_not_utf_8_costs_only_itself(tmp_path: Path) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfea")])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    items = read(tmp_path / "a.parquet")
    assert (texts(items), reasons(items)) == (["a"], ["a document that is not UTF-8"])


def broken_files(folder: Path) -> dict[str, bytes]:
    pq.write_table(pa.table({"text": [f"{i} " * 50 for i in range(20_000)]}), folder / "whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    middle = len(whole) // 2
    return {
        "truncated.jsonl.gz": gzip.compress(JSON_LINES)[:-4],
        "garbage.jsonl.gz": gzip.compress(JSON_LINES) + b"and more",
        "plain.jsonl.gz": JSON_LINES,
        "truncated.jsonl.zst": zstandard(JSON_LINES)[:-3],
        "plain.txt.zst": b"hello",
        "truncated.parquet": whole[:-10],
        "empty.parquet": b"",
        "flipped.parquet": whole[:middle] + bytes(2000) + whole[middle + 2000 :],
        "lines.parquet": JSON_LINES,
        "whole.parquet.gz": gzip.compress(whole),
    }


def test_a_file_that_is_not_whole_refuses_the_text_by_its_path(tmp_path: Path) -> None:
    for name, data in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        words = refusal(tmp_path / name)
        assert "cannot read the text of 'a'" in words
        assert name in words


def test_a_pipe_is_refused_as_what_it_is(tmp_path: Path) -> None:
    """`btm score <(zcat a.gz)` was told that no file matches /dev/fd/63, and to check the path."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        assert "no regular file" in (said := refusal(path))
        assert f"{path}, a pipe or a device" in said


def test_a_pattern_that_matches_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for pattern in ("none.txt", "*.jsonl", "**/*.jsonl", "loop", "x" * 5000, "[", "../" * 50 + "none"):
        assert "matches no file" in refusal(tmp_path / pattern)
    assert "folder/*.jsonl" in refusal(tmp_path / "folder")
    (tmp_path / "folder" / "a.md").touch()
    said = refusal(tmp_path / "folder")
    assert "is a folder" in said
    assert f"'{tmp_path}/folder/*.md'" in said


def test_links_that_lead_in_circles_are_walked_once(tmp_path: Path) -> None:
    """`glob.glob` follows links: two of them that lead up make it walk 2^40 paths."""
    (tmp_path / "in").mkdir()
    for name in ("up", "back"):
        (tmp_path / "in" / name).symlink_to("..")
    (tmp_path / "in" / "a.txt").write_text("hello")
    assert texts(read(tmp_path / "**/*.txt")) == ["hello"]


def write_tree(folder: Path) -> None:
    for name in (
        "a.txt",
        "b.txt",
        ".hidden.txt",
        "in/a.txt",
        "in/deep/c.txt",
        "in/.git/d.txt",
        "x[1].txt",
        "e.md",
        "data [v2]/f.txt",
        "data v/g.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


GLOBS = {
    "a.txt": ["a.txt"],
    "x[1].txt": ["x[1].txt"],
    "[ab].txt": ["a.txt", "b.txt"],
    "?.txt": ["a.txt", "b.txt"],
    "*/a.txt": ["in/a.txt"],
    "*.txt": ["a.txt", "b.txt", "x[1].txt"],
    "**/a.txt": ["a.txt", "in/a.txt"],
    "in/**": ["in/a.txt", "in/deep/c.txt"],
    "in/**/*.txt": ["in/a.txt", "in/deep/c.txt"],
    "**/deep/*": ["in/deep/c.txt"],
    ".hidden.txt": [".hidden.txt"],
    ".h*": [".hidden.txt"],
    "x[1]*": ["x[1].txt"],
    "data [v2]/f.txt": ["data [v2]/f.txt"],
    "data [v2]/*.txt": ["data [v2]/f.txt"],
    "data [v2]/[ef].txt": ["data [v2]/f.txt"],
    "data [v2]/**": ["data [v2]/f.txt"],
    "**/data [v2]/*.txt": ["data [v2]/f.txt"],
    "data [v2]*/*.txt": ["data v/g.txt"],
}


@pytest.mark.parametrize("pattern", GLOBS)
def test_globs_mean_what_they_mean_in_a_shell(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path)
    assert texts(read(tmp_path / pattern)) == GLOBS[pattern]
    monkeypatch.chdir(tmp_path)
    assert texts(read(pattern)) == GLOBS[pattern]
    assert texts(read(f"./{pattern}")) == GLOBS[pattern]


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(read("~/a.txt")) == ["a.txt"]
    assert texts(read("~/in/**/c.txt")) == ["in/deep/c.txt"]


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    write_tree(tmp_path)
    source = TextPlan(
        name="a", text=(str(tmp_path / "a.txt"), str(tmp_path / "*.txt")), test=(str(tmp_path / "e.md"),)
    )
    items = list(read_documents(source, ReadingPlan()))
    assert [(item.text, item.split) for item in items if isinstance(item, Document)] == [
        ("a.txt", None),
        ("b.txt", None),
        ("x[1].txt", None),
        ("e.md", "test"),
    ]


def test_a_fingerprint_changes_with_the_files_and_only_with_them(tmp_path: Path) -> None:
    write_tree(tmp_path)
    source = TextPlan(name="a", text=(str(tmp_path / "*.txt"),))
    before = fingerprint(source)
    assert fingerprint(source) == before
    os.utime(tmp_path / "e.md", ns=(0, 0))
    assert fingerprint(source) == before
    os.utime(tmp_path / "a.txt", ns=(0, 0))
    touched = fingerprint(source)
    (tmp_path / "c.txt").write_text("new")
    assert len({json.dumps(f) for f in (before, touched, fingerprint(source))}) == 3


def test_in_a_jobs_copy_a_fingerprint_changes_with_the_bytes_alone(tmp_path: Path) -> None:
    """Ray unpacks a copy for each node, and for each job anew, with the present as every file's time."""
    stamps = []
    for number, text in enumerate(("same", "same", "new!")):
        copy = (
            tmp_path / str(number) / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
        )
        copy.mkdir(parents=True)
        (copy / "a.txt").write_text(text)
        os.utime(copy / "a.txt", ns=(0, number))
        source = TextPlan.model_validate({"name": "a", "text": "./*.txt"}, context={PLAN_FOLDER: str(copy)})
        stamps.append(fingerprint(source))
    assert stamps[0] == stamps[1] != stamps[2]
    assert stamps[0]["text"][0][0] == "./a.txt"


MEASURE = """
import resource, sys
from btm_cluster.data.sources import Document, read_documents
from btm_cluster.plan import ReadingPlan, TextPlan

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
for path in sys.argv[1:]:
    items = read_documents(TextPlan(name="a", text=(path,)), ReadingPlan())
    good = sum(isinstance(item, Document) for item in items)
    print(good, peak() - before)
"""


def test_monstrous_lines_and_row_groups_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """A line of 200 MB takes what a line may take, 12 MB, and not what it
    has; a row group is read in pieces."""
    with (tmp_path / "a.jsonl").open("wb") as plain, gzip.open(tmp_path / "b.jsonl.gz", "wb", 1) as packed:
        for file in (plain, packed):
            file.write(JSON_LINES + b'{"text": "')
            for _ in range(200):
                file.write(b"x" * 1_000_000)
            file.write(b'"}\n' + JSON_LINES)
    with (tmp_path / "c.txt").open("wb") as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    rows = [str(i) * 500 for i in range(80_000)]
    pq.write_table(
        pa.table({"text": rows}),
        tmp_path / "d.parquet",
        row_group_size=10**9,
        compression=None,
        use_dictionary=False,
    )
    assert (tmp_path / "d.parquet").stat().st_size > 190_000_000
    names = ("a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [good for good, _ in measured] == [6, 6, 0, 80_000]
    assert all(megabytes < 100 for _, megabytes in measured), measured


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSON_LINES)
    (folder / "test.jsonl").write_text('{"text": "held out"}\n{"text": null}\n')
    return folder


def read_dataset(**fields: Any) -> list[Document | BadDocument]:
    source = TextPlan(name="a", dataset=DatasetPlan(**fields))
    fingerprint(source)
    return list(read_documents(source, ReadingPlan()))


def test_a_local_data_set_of_json_lines_is_streamed_by_split(dataset: Path) -> None:
    items = read_dataset(name=str(dataset), test_split="test")
    documents = [(item.text, item.split) for item in items if isinstance(item, Document)]
    assert documents == [(text, None) for text in DOCUMENTS] + [("held out", "test")]
    assert reasons(items) == ["a row without text in the field 'text'"]


def test_a_local_data_set_of_parquet_is_streamed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "train.parquet")
    assert texts(read_dataset(name=str(tmp_path))) == DOCUMENTS


def test_a_data_set_changes_its_fingerprint_with_its_files(dataset: Path) -> None:
    source = TextPlan(name="a", dataset=DatasetPlan(name=str(dataset)))
    before = fingerprint(source)
    (dataset / "train.jsonl").write_bytes(JSON_LINES * 2)
    assert fingerprint(source) != before


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # `datasets` leaves a file that it fails on open
def test_a_data_set_that_cannot_be_read_is_refused_by_name(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for fields in (
        {"name": str(dataset), "split": "validation"},
        {"name": str(dataset), "configuration": "none"},
        {"name": str(tmp_path / "empty")},
        {"name": "../not/a name"},
    ):
        with pytest.raises(TextError, match="cannot read the data set of 'a'") as caught:
            read_dataset(**fields)
        assert fields["name"] in caught.value.found
    (dataset / "train.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(TextError, match="JSON parse error"):
        read_dataset(name=str(dataset))


@pytest.fixture(scope="module")
def bucket(object_store: dict[str, str]) -> Iterator[Any]:
    """A bucket of a real S3 server, reached as any bucket is: through the AWS_* variables."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="corpus")
        yield client
        client.close()


def test_files_and_globs_in_s3_mean_what_they_mean_locally(bucket: Any, tmp_path: Path) -> None:
    write_tree(tmp_path)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        bucket.upload_file(str(path), "corpus", f"tree/{path.relative_to(tmp_path)}")
    for pattern, found in GLOBS.items():
        assert texts(read(f"s3://corpus/tree/{pattern}")) == found, pattern


def test_every_kind_of_file_is_read_from_s3(bucket: Any, tmp_path: Path) -> None:
    for suffix, compress in COMPRESSIONS.items():
        bucket.put_object(
            Bucket="corpus", Key=f"kinds/a b#%41{suffix}.jsonl{suffix}", Body=compress(JSON_LINES)
        )
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    bucket.upload_file(str(tmp_path / "a.parquet"), "corpus", "kinds/a.parquet")
    assert texts(read("s3://corpus/kinds/*")) == DOCUMENTS * (len(COMPRESSIONS) + 1)
    assert texts(read("s3://corpus/kinds/a b#%41.gz.jsonl.gz")) == DOCUMENTS


def test_a_fingerprint_of_s3_changes_with_the_object(bucket: Any) -> None:
    source = TextPlan(name="a", text=("s3://corpus/one/*",))
    bucket.put_object(Bucket="corpus", Key="one/a.jsonl", Body=JSON_LINES)
    before = fingerprint(source)
    assert fingerprint(source) == before
    bucket.put_object(Bucket="corpus", Key="one/a.jsonl", Body=JSON_LINES * 2)
    assert fingerprint(source) != before


@pytest.mark.usefixtures("bucket")
def test_what_is_not_in_s3_is_refused_by_its_address() -> None:
    for address in (
        "s3://corpus/none.jsonl",
        "s3://corpus/none/*",
        "s3://none/a.jsonl",
        "s3://none/*",
        "s3://corpus",
    ):
        assert address in refusal(address)
    for address in ("s3:///a", "s3://corpus/a//b"):
        assert "AWS_ENDPOINT_URL" in refusal(address)


def test_an_s3_server_that_refuses_the_credentials_is_named(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.create_bucket(Bucket="private")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "SIGNATURE_DOES_NOT_MATCH" in refusal("s3://private/*.jsonl")
