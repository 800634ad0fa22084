"""Files of text opened as bytes in UTF-8: their compression is undone, and UTF-16
and UTF-32 are told by their byte-order mark."""

import codecs
import gzip
import io
import os
import stat
from collections.abc import Callable
from typing import Any, TypeAlias

import pyarrow

from btm_cluster.data.files import S3, bucket, readable
from btm_cluster.errors import TextError
from btm_cluster.plan.kinds import codec

_BYTE_ORDER_MARKS = {  # the longer first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHUNK_BYTES = 1 << 16


class Budget:
    """How many bytes, decompressed, may still be read of a source that is not trusted."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = self._left = most_bytes

    def spend(self, path: str, size_bytes: int) -> None:
        """Counts what was read.

        Raises:
            TextError: it was too much.
        """
        self._left -= size_bytes
        if self._left < 0:
            raise TextError(
                "a text is larger than it may be",
                found=f"more than {self._most_bytes:,} bytes, decompressed, up to {path}",
                expected=f"at most {self._most_bytes:,}",
                remedy="cut it into several domains, or raise `expansion.inbox.most_decompressed_gigabytes`",
            )


Count: TypeAlias = Callable[[int], None]
"""Told what was read: bytes of files as they are stored, or documents of a data set."""


class _Metered(io.RawIOBase):
    """A stream that tells how much was read of it."""

    def __init__(self, raw: Any, count: Count) -> None:
        self._raw, self._count = raw, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._raw.readinto(buffer))
        self._count(size)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Counted(io.RawIOBase):
    """A stream that spends a budget."""

    def __init__(self, path: str, raw: Any, budget: Budget) -> None:
        self._path, self._raw, self._budget = path, raw, budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = int(self._raw.readinto(buffer))
        self._budget.spend(self._path, size)
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Gunzipped(gzip.GzipFile):
    """Python's reader: pyarrow's takes the zero bytes for an error that some
    tools write up to a whole block."""

    def __init__(self, raw: Any) -> None:
        super().__init__(fileobj=raw)
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Recoded(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 as UTF-8. What is no character becomes bytes that are not UTF-8."""

    def __init__(self, raw: io.BufferedReader, encoding: str) -> None:
        self._raw, self._encoding = raw, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"more"
        while not self._ready and data:
            data = self._raw.read(_CHUNK_BYTES)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as exc:
                raise OSError(
                    f"not {self._encoding.upper()}, which its first bytes say: {exc.reason}"
                ) from exc
            self._ready = text.encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_stream(path: str, budget: Budget | None = None, count: Count | None = None) -> io.BufferedReader:
    """A file's bytes, decompressed and in UTF-8.

    With a budget, which they spend, no link of any kind is followed.
    """
    raw: Any = _open_whole(path, is_trusted=budget is None)
    if count is not None:
        raw = _Metered(raw, count)
    match codec(path):
        case "gzip":
            raw = _Gunzipped(raw)
        case str(other):
            raw = pyarrow.CompressedInputStream(raw, other)
    stream = io.BufferedReader(raw if budget is None else _Counted(path, raw, budget), 1 << 20)
    try:
        head = stream.peek(4)
    except Exception:
        stream.close()
        raise
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    return stream if encoding is None else io.BufferedReader(_Recoded(stream, encoding), _CHUNK_BYTES)


def open_random(path: str) -> tuple[pyarrow.NativeFile, int]:
    """A file to be read at any place, and how much to read ahead."""
    if path.startswith(S3):
        inner = path.removeprefix(S3)
        # Each piece is a request of its own.
        return bucket(inner.split("/")[0]).open_input_file(inner), 8 << 20
    return pyarrow.OSFile(os.fsencode(os.path.expanduser(path))), 1 << 20


def _open_whole(path: str, is_trusted: bool) -> Any:
    if path.startswith(S3):
        inner = path.removeprefix(S3)
        return bucket(inner.split("/")[0]).open_input_stream(inner, compression=None, buffer_size=8 << 20)
    if is_trusted:
        return open(os.path.expanduser(path), "rb", buffering=_CHUNK_BYTES)
    # Checked before, when the inbox was listed, but it may have been put there since.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=_CHUNK_BYTES)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        file.close()
        raise OSError(f"{readable(path)} is a link, or no file")
    return file
