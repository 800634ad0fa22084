"""Kinds of text files, recognised by their names: how each is read, and which are not.

Knows names and patterns only; `data/readers.py` reads what is in the files.
"""

import glob
from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["JSON lines", "table", "Parquet", "plain text", "unread"]

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Between the columns of a table."""
ROWS: frozenset[Kind] = frozenset({"JSON lines", "table", "Parquet"})
"""Kinds whose documents are a field of rows."""
_JSON_LINES = {".json", ".jsonl", ".jsonlines", ".ldjson", ".ndjson"}
_COMPRESSED = """.7z .br .bz .cab .gzip .lz .lz4 .lzma .lzo .rar .snappy .sz .tar .tbz .tbz2 .tgz .txz .tzst .xz .z .zip
.zstd"""
_DOCUMENTS = (
    ".azw3 .djvu .doc .docx .epub .ipynb .mobi .odp .ods .odt .pdf .ppt .pptx .rtf .xls .xlsb .xlsm .xlsx"
)
_MARKUP = ".atom .htm .html .mht .mhtml .nxml .rss .sgm .sgml .svg .tei .warc .wat .wet .xhtml .xml"
_DATA = """.accdb .arrow .avro .bin .ckpt .db .dta .duckdb .feather .geojson .h5 .hdf5 .ipc .json5 .jsonld .mat .mdb
.msgpack .nc .npy .npz .orc .parq .pickle .pkl .pq .psv .pt .pth .rda .rds .safetensors .sas7bdat .sav .sqlite .sqlite3
.tab .tfrecord .tfrecords"""
UNREAD = {*_COMPRESSED.split(), *_DOCUMENTS.split(), *_MARKUP.split(), *_DATA.split(), *CODECS}
"""Not read, since what is in them would be taken for prose.

A codec is among them for files compressed twice.
"""
CONVERT = "unpack it, or convert it to JSON lines, CSV, Parquet or plain text"


def ending(path: str) -> str:
    """The end of a file's name without its compression: `.jsonl` for a.JSONL.gz."""
    name = PurePosixPath(path.lower())
    return name.with_suffix("").suffix if name.suffix in CODECS else name.suffix


def codec(path: str) -> str | None:
    """How a file is compressed, by its name."""
    return CODECS.get(PurePosixPath(path.lower()).suffix)


def kind_of(path: str) -> Kind:
    """How a file is read."""
    end = ending(path)
    if end in _JSON_LINES:
        return "JSON lines"
    if end in SEPARATORS:
        return "table"
    if end in UNREAD:
        return "unread"
    return "Parquet" if end == ".parquet" else "plain text"


def kind_of_pattern(pattern: str) -> Kind | None:
    """How all files that a pattern can match are read; None where its wildcards leave that open."""
    name = pattern.rpartition("/")[2]
    bare = PurePosixPath(name).stem if codec(name) else name
    _, dot, end = bare.rpartition(".")
    return None if glob.has_magic(end if dot else bare) else kind_of(name)
