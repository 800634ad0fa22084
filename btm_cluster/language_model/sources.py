"""Sources of text: files and data sets, read as a stream of documents.

Local and s3:// files go through `pyarrow.fs`, which opens both alike and undoes .gz and .zst; data sets go through
`datasets`, streaming. JSON lines are read here, one by one, since a bad or monstrous line must cost only itself.
Knows nothing of splits, duplicates or tokens.
"""

import fnmatch
import glob
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs
import pyarrow.parquet

from btm_cluster.errors import TextError
from btm_cluster.plan import DatasetPlan, ReadingPlan, TextPlan

_CHUNK_CHARACTERS = 1 << 20


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
        TextError: a pattern that matches no file, or files that cannot be listed.
    """
    if source.dataset is not None:
        folder = Path(source.dataset.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return {"dataset": source.dataset.model_dump(), "files": [_stamp(str(path)) for path in files]}
    return {split: [_stamp(path) for path in paths] for split, paths in source_files(source).items()}


def source_files(source: TextPlan) -> dict[str, list[str]]:
    """The files of a source by the split they are given for; `text` is split by content hash."""
    patterns = {"text": source.text, "development": source.development, "test": source.test}
    return {
        split: sorted({path for pattern in given for path in _expand(source.name, pattern)})
        for split, given in patterns.items()
    }


def read_documents(source: TextPlan, reading: ReadingPlan) -> Iterator[Document | BadDocument]:
    """The documents of a source, in the order of its files; never more than one of them in memory."""
    longest = reading.longest_document_characters
    if source.dataset is not None:
        yield from _read_dataset(source.name, source.dataset, source.field, longest)
        return
    for split, paths in source_files(source).items():
        for path in paths:
            for item in _read_file(path, source, longest):
                yield item if isinstance(item, BadDocument) else Document(item, None if split == "text" else split)


def _expand(name: str, pattern: str) -> list[str]:
    if "://" not in pattern:
        found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    else:
        found = _expand_remote(name, pattern)
    if not found:
        raise TextError(f"the text of {name!r} matches no file", found=pattern, remedy="check the path or glob")
    return found


def _expand_remote(name: str, pattern: str) -> list[str]:
    scheme, _, path = pattern.partition("://")
    folder = _fixed_part(path) if glob.has_magic(path) else path
    try:
        system, root = pyarrow.fs.FileSystem.from_uri(f"{scheme}://{folder}")
        infos = system.get_file_info(pyarrow.fs.FileSelector(root, recursive=True) if glob.has_magic(path) else [root])
    except (OSError, pyarrow.ArrowException) as exc:
        raise TextError(f"cannot list the text of {name!r}", found=f"{pattern}: {exc}", remedy="check access") from exc
    files = [info.path for info in infos if info.type == pyarrow.fs.FileType.File]
    return [f"{scheme}://{found}" for found in files if found == path or fnmatch.fnmatchcase(found, path)]


def _fixed_part(path: str) -> str:
    """The folders before the first one with a wildcard."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first])


def _open_system(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if "://" in path:
        system, inner = pyarrow.fs.FileSystem.from_uri(path)
        return system, inner
    return pyarrow.fs.LocalFileSystem(), str(Path(path).absolute())


def _stamp(path: str) -> list[Any]:
    system, inner = _open_system(path)
    info = system.get_file_info(inner)
    return [path, info.size, info.mtime_ns]


def _read_file(path: str, source: TextPlan, longest: int) -> Iterator[str | BadDocument]:
    bare = path.removesuffix(".gz").removesuffix(".zst")
    system, inner = _open_system(path)
    try:
        if bare.endswith(".parquet"):
            yield from _read_parquet(path, system, inner, source.field, longest)
        else:
            with (
                system.open_input_stream(inner, compression="detect") as raw,
                io.BufferedReader(raw, 1 << 20) as stream,
            ):
                if bare.endswith((".jsonl", ".ndjson", ".json")):
                    yield from _read_json_lines(path, stream, source.field, longest)
                else:
                    yield from _read_plain(path, stream, source.delimiter, longest)
    except (OSError, EOFError, pyarrow.ArrowException) as exc:
        raise TextError(
            f"cannot read the text of {source.name!r}", found=f"{path}: {exc}", remedy="check or replace the file"
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
                line = stream.readline(longest_bytes)
            yield BadDocument(where, f"a line longer than {longest_bytes} bytes")
        elif line.strip():
            yield _document_of(where, line, field, longest)


def _document_of(where: str, line: bytes, field: str, longest: int) -> str | BadDocument:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return BadDocument(where, "a line that is not JSON in UTF-8")
    if not isinstance(row, Mapping):
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
        return BadDocument(where, "a document with half of a surrogate pair")
    return text


def _read_plain(
    path: str, stream: io.BufferedReader, delimiter: str | None, longest: int
) -> Iterator[str | BadDocument]:
    text = io.TextIOWrapper(stream, encoding="utf-8")
    held, too_long, part = "", False, 0

    def finish(piece: str) -> str | BadDocument:
        nonlocal part, too_long
        part += 1
        bad = too_long or len(piece) > longest
        too_long = False
        return BadDocument(f"{path}, document {part}", f"a document longer than {longest} characters") if bad else piece

    try:
        while chunk := text.read(_CHUNK_CHARACTERS):
            *whole, held = (held + chunk).split(delimiter) if delimiter else [held + chunk]
            for piece in whole:
                yield finish(piece)
            if len(held) > longest + len(delimiter or ""):
                # Kept short, but long enough that a delimiter across two chunks is still seen.
                held, too_long = held[-len(delimiter or " ") :], True
        yield finish(held)
    except UnicodeDecodeError:
        yield BadDocument(path, "a text file that is not UTF-8")


def _read_parquet(
    path: str, system: pyarrow.fs.FileSystem, inner: str, field: str, longest: int
) -> Iterator[str | BadDocument]:
    with pyarrow.parquet.ParquetFile(system.open_input_file(inner)) as file:
        if field not in file.schema_arrow.names:
            yield BadDocument(path, f"a Parquet file without the field {field!r}")
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _checked(f"{path}, row {number}", value, field, longest)


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
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as exc:
            raise TextError(
                f"cannot read the data set of {name!r}",
                found=f"{dataset.name}, split {given}: {exc}",
                remedy="check its name, configuration, split and that the hub can be reached",
            ) from exc
