"""Sources of text: files and data sets, read as a stream of documents.

Files are found and opened by `files.py`; data sets are read by `datasets`, streaming. JSON lines are read here, one by
one, since a bad or monstrous line must cost only itself. Knows nothing of splits, duplicates or tokens.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from btm_cluster.errors import TextError, one_line
from btm_cluster.language_model.files import (
    Budget,
    SourceFile,
    ending,
    find_below,
    find_files,
    open_random,
    open_stream,
)
from btm_cluster.plan import DatasetPlan, ReadingPlan, TextPlan

_CHUNK_CHARACTERS = 1 << 20
_PARQUET_ROWS = 64
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
UNREAD = {".7z", ".docx", ".lz", ".lzma", ".pdf", ".rar", ".tar", ".tgz", ".xz", ".z", ".zip"}


@dataclass(frozen=True)
class Document:
    """A document, and the split its file was given for (None: by content hash)."""

    text: str
    split: str | None


@dataclass(frozen=True)
class BadDocument:
    """Something that is not a usable document: where, and why."""

    where: str
    reason: str


def fingerprint(source: TextPlan) -> dict[str, Any]:
    """What tells that a source has changed: path, size and modification time of its files; revision of a data set.

    Raises:
        TextError: a pattern that matches no file, files that cannot be listed, a data set that is not there.
    """
    if source.dataset is None:
        return {split: [list(file) for file in files] for split, files in source_files(source).items()}
    folder, described = Path(source.dataset.name), {"dataset": source.dataset.model_dump()}
    if folder.is_dir():
        return described | {"files": [list(file) for file in find_below(folder)]}
    return described | {"files": [], "revision": source.dataset.revision or _hub_revision(source.name, source.dataset)}


def source_files(source: TextPlan) -> dict[str, list[SourceFile]]:
    """The files of a source by the split they are given for; `text` is split by content hash."""
    patterns = {"text": source.text, "development": source.development, "test": source.test}
    return {
        split: sorted({file for pattern in given for file in _expand(source.name, pattern)})
        for split, given in patterns.items()
    }


def read_documents(
    source: TextPlan, reading: ReadingPlan, most_bytes: int | None = None
) -> Iterator[Document | BadDocument]:
    """The documents of a source, in the order of its files; never more than one of them in memory.

    `most_bytes` is for a source that is not trusted: so much is read of it, decompressed, and no link is followed.

    Raises:
        TextError: a file or data set that cannot be read to its end.
    """
    budget = None if most_bytes is None else Budget(most_bytes)
    longest = reading.longest_document_characters
    if source.dataset is not None:
        yield from _read_dataset(source.name, source.dataset, source.field, longest)
        return
    for split, files in source_files(source).items():
        for file in files:
            for item in _read_file(file.path, source, longest, budget):
                yield item if isinstance(item, BadDocument) else Document(item, None if split == "text" else split)


def _expand(name: str, pattern: str) -> list[SourceFile]:
    try:
        found = find_files(pattern)
    except (OSError, pyarrow.ArrowException) as exc:
        raise TextError(
            f"cannot list the text of {name!r}",
            found=f"{pattern}: {one_line(exc)}",
            remedy="check the address, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment",
        ) from exc
    if not found:
        is_folder = os.path.isdir(os.path.expanduser(pattern))
        remedy = f"name its files, such as {pattern.rstrip('/')}/*.jsonl" if is_folder else "check the path or glob"
        found_there = f"{pattern}{', a folder' if is_folder else ''}"
        raise TextError(
            f"the text of {name!r} matches no file", found=found_there, expected="at least one file", remedy=remedy
        )
    return found


def _read_file(path: str, source: TextPlan, longest: int, budget: Budget | None) -> Iterator[str | BadDocument]:
    kind = ending(path)
    if kind in UNREAD:
        yield BadDocument(path, f"a {kind} file, which is not read: unpack or convert it")
        return
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, source.field, longest)
        else:
            with open_stream(path, budget) as stream:
                if kind in _JSON_LINES:
                    yield from _read_json_lines(path, stream, source.field, longest)
                else:
                    yield from _read_plain(path, stream, source.delimiter, longest)
    except (OSError, EOFError, pyarrow.ArrowException) as exc:
        raise TextError(
            f"cannot read the text of {source.name!r}",
            found=f"{path}: {one_line(exc)}",
            expected="a whole file of the kind that its name says",
            remedy="mend or replace the file",
        ) from exc


def _read_json_lines(path: str, stream: io.BufferedReader, field: str, longest: int) -> Iterator[str | BadDocument]:
    # A character takes at most 12 bytes in JSON (\ud83d\ude00); the rest is room for other fields.
    longest_bytes = 12 * longest + (1 << 16)
    number = 0
    while line := stream.readline(longest_bytes + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > longest_bytes:
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 20)
            yield BadDocument(where, f"a line longer than {longest_bytes} bytes")
        elif line.strip():
            yield _document_of(where, line, field, longest)


def _document_of(where: str, line: bytes, field: str, longest: int) -> str | BadDocument:
    try:
        row = json.loads(line.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return BadDocument(where, "a line that is not JSON in UTF-8")
    if not isinstance(row, dict):
        return BadDocument(where, "a line that is not a JSON object")
    return _checked(where, row.get(field), field, longest)


def _checked(where: str, text: Any, field: str, longest: int) -> str | BadDocument:
    if not isinstance(text, str):
        return BadDocument(where, f"a row without text in the field {field!r}")
    if len(text) > longest:
        return BadDocument(where, f"a document longer than {longest} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        return BadDocument(where, "a document that is not UTF-8")
    return text


def _read_plain(
    path: str, stream: io.BufferedReader, delimiter: str | None, longest: int
) -> Iterator[str | BadDocument]:
    """Whole files, or their parts; line ends become \\n."""
    # What is not UTF-8 becomes surrogates, so that it costs only the document that it stands in.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    cut = delimiter.replace("\r\n", "\n") if delimiter else None
    held, too_long, part = "", False, 0

    def finish(piece: str) -> str | BadDocument:
        nonlocal part, too_long
        part, was_too_long, too_long = part + 1, too_long, False
        where = f"{path}, document {part}" if cut else path
        if was_too_long:
            return BadDocument(where, f"a document longer than {longest} characters")
        return BadDocument(where, "a binary file") if "\0" in piece else _checked(where, piece, "", longest)

    while chunk := text.read(_CHUNK_CHARACTERS):
        *whole, held = (held + chunk).split(cut) if cut else [held + chunk]
        for piece in whole:
            yield finish(piece)
        if len(held) > longest + len(cut or ""):
            # Kept short, but long enough that a delimiter across two chunks is still seen.
            held, too_long = held[-len(cut or " ") :], True
    yield finish(held)


def _read_parquet(path: str, field: str, longest: int) -> Iterator[str | BadDocument]:
    stream, ahead = open_random(path)
    # Buffered in pieces: by default pyarrow holds the whole column of a row group, which may be the whole file.
    with stream, pyarrow.parquet.ParquetFile(stream, buffer_size=ahead, pre_buffer=False) as file:
        if field not in file.schema_arrow.names:
            yield BadDocument(path, f"a Parquet file without the field {field!r}")
            return
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
            for cell in batch.column(0):
                number += 1
                yield _checked(f"{path}, row {number}", _plain(cell, longest), field, longest)


def _plain(cell: pyarrow.Scalar, longest: int) -> Any:
    """A cell as a Python value: no more of a monstrous one than shows that it is too long."""
    if not isinstance(cell, pyarrow.BinaryScalar) or not cell.is_valid:
        return cell.as_py()
    data = cell.as_buffer()
    return data[: 4 * longest + 1].to_pybytes().decode(errors="surrogateescape")  # a character takes at most 4 bytes


def _read_dataset(name: str, dataset: DatasetPlan, field: str, longest: int) -> Iterator[Document | BadDocument]:
    import datasets

    splits = {None: dataset.split, "development": dataset.development_split, "test": dataset.test_split}
    for split, given in splits.items():
        if given is None:
            continue
        try:
            rows = datasets.load_dataset(
                dataset.name, dataset.configuration, split=given, revision=dataset.revision, streaming=True
            )
            for number, row in enumerate(rows, start=1):
                checked = _checked(f"{dataset.name}, {given}, row {number}", row.get(field), field, longest)
                yield checked if isinstance(checked, BadDocument) else Document(checked, split)
        except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as exc:
            raise _dataset_error(name, f"{dataset.name}, split {given}", exc) from exc


def _hub_revision(name: str, dataset: DatasetPlan) -> str:
    """The commit that a data set on the hub is at."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(dataset.name, timeout=30).sha)
    except Exception as exc:  # the hub's own errors, and those of whatever HTTP library it uses
        raise _dataset_error(name, f"no folder {dataset.name}, and from the hub", exc) from exc


def _dataset_error(name: str, where: str, exc: Exception) -> TextError:
    return TextError(
        f"cannot read the data set of {name!r}",
        found=f"{where}: {one_line(exc)}",
        expected="a local folder that `datasets` reads, or a name on a hub that can be reached",
        remedy="check name, configuration, split and network; files with bad lines can be read as `text`",
    )
