"""Reads of a bucket's objects by requests that botocore signs and sends, without boto3's layers around each one.

boto3 serves the first read, and its request shows where objects lie and how they are asked for. Later requests are
made like it, for half of the CPU time. Only a plain answer counts: whatever else comes, boto3 is asked, which tries
again, follows redirects and words errors. Endpoint, credentials, certificates, proxies and connections are boto3's.
"""

import shutil
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.exceptions as failures
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.hooks import first_non_none_response
from botocore.response import StreamingBody
from s3transfer.exceptions import S3DownloadFailedError
from urllib3.exceptions import HTTPError

from btm_cluster.storage.s3_errors import FAILURES, code_of, is_transient, starts_behind_the_end

PART_BYTES = 8 * 2**20
THREADS = 8
"""Parts under way at once, of each file."""
PART_TRIES = 5
"""Tries of a part whose body breaks off: as many as s3transfer has."""
BUFFER_BYTES = 2**18
"""Buffers of 1 MiB come fresh from the system each time."""
_EVENT = "s3.GetObject"
_HEADERS = {"Range": "Range", "IfMatch": "If-Match"}
"""Headers that differ between requests for one object, by the names of boto3's arguments."""
_REPLACED = {"PreconditionFailed", "412"}


@dataclass(frozen=True)
class _Pattern:
    """Boto3's last request for an object, without what belongs to that one."""

    base: str
    """The URL up to the key."""
    headers: Mapping[str, str]
    context: Mapping[str, Any]
    signer: Any


class ObjectReads:
    """Reads of one bucket's objects. Errors are boto3's."""

    def __init__(self, client: Any, bucket: str, always: Mapping[str, str]) -> None:
        """`always` are arguments of every request."""
        self.client, self._always = client, {"Bucket": bucket, **always}
        self._pattern: _Pattern | None = None
        # Else client and reads would hold each other, and with that their connections.
        learn = weakref.WeakMethod(self._learn)

        def learn_while_there(**known: Any) -> None:
            if (there := learn()) is not None:
                there(**known)

        client.meta.events.register(f"before-sign.{_EVENT}", learn_while_there)

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        """Its bytes from `start` on, `size` of them at most, not 0."""
        whole = (start, size) == (0, None)
        try:
            found = self._get(key, {} if whole else _range_of(start, size))
        except failures.ClientError as exc:
            if starts_behind_the_end(exc):
                return b""
            raise
        with _body_of(found) as body:
            return bytes(body.read())

    def download(self, key: str, target: Path) -> None:
        """Writes its bytes to a file, a large one's in parts, several at once.

        Raises:
            S3DownloadFailedError: it was replaced under way.
        """
        target.write_bytes(b"")  # an earlier try may have left more than there is now
        try:
            first = self._get(key, _range_of(0, PART_BYTES))
        except failures.ClientError as exc:
            if starts_behind_the_end(exc):  # it is empty
                return
            raise
        size = int(first.get("ContentRange", "0").rpartition("/")[2])
        alike = {"IfMatch": first["ETag"]} if "ETag" in first else {}
        with ThreadPoolExecutor(THREADS, thread_name_prefix="download") as pool:
            parts = [
                pool.submit(self._download_part, key, start, target, alike)
                for start in range(PART_BYTES, size, PART_BYTES)
            ]
            try:
                _write(first, target, 0)
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _download_part(self, key: str, start: int, target: Path, alike: Mapping[str, str]) -> None:
        for last in (*[False] * (PART_TRIES - 1), True):
            try:
                _write(self._get(key, {**_range_of(start, PART_BYTES), **alike}), target, start)
                return
            except failures.ClientError as exc:
                if code_of(exc) in _REPLACED:
                    raise S3DownloadFailedError(f"{key} was replaced while it was downloaded") from exc
                raise
            except FAILURES as exc:
                if last or not is_transient(exc):
                    raise

    def _get(self, key: str, asked: Mapping[str, str]) -> Mapping[str, Any]:
        """An answer as boto3's `get_object` gives it: Body, and ETag and ContentRange where the service says them.

        Raises:
            ResponseStreamingError: it is another part of the object than was asked for.
        """
        found = None if self._pattern is None else self._plain_answer(self._pattern, key, asked)
        if found is None:
            found = self.client.get_object(**self._always, Key=key, **asked)
        start = asked.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        if not found.get("ContentRange", "bytes 0-").startswith(f"bytes {start}-"):
            found["Body"].close()
            raise failures.ResponseStreamingError(
                error=f"not the bytes from {start} on, which were asked for"
            )
        return found

    def _plain_answer(
        self, pattern: _Pattern, key: str, asked: Mapping[str, str]
    ) -> Mapping[str, Any] | None:
        """None where it is for boto3 to ask.

        Raises:
            ClientError: there is no such object.
        """
        headers = {**pattern.headers, **{_HEADERS[name]: value for name, value in asked.items()}}
        request = AWSRequest("GET", pattern.base + _encoded(key), headers, stream_output=True)
        request.context.update(pattern.context)
        try:
            pattern.signer.sign("GetObject", request)
            prepared = request.prepare()
            answers = self.client.meta.events.emit(f"before-send.{_EVENT}", request=prepared)
            answer = first_non_none_response(answers) or self.client._endpoint.http_session.send(prepared)
            if answer.status_code in (200, 206):
                return _parsed(answer)
            is_missing = answer.status_code == 404 and b"<Code>NoSuchKey</Code>" in answer.content
        except (*FAILURES, HTTPError):
            return None
        if is_missing:
            raise failures.ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
        return None

    def _learn(self, request: AWSRequest, request_signer: Any, **_: Any) -> None:
        """Keeps the pattern of a request that boto3 is about to sign."""
        key = request.context.get("input_params", {}).get("Key")
        if key is None or not request.url.endswith(_encoded(key)):
            return
        own = {header.lower() for header in _HEADERS.values()}
        self._pattern = _Pattern(
            request.url.removesuffix(_encoded(key)),
            {name: value for name, value in request.headers.items() if name.lower() not in own},
            {name: request.context[name] for name in ("auth_type", "signing") if name in request.context},
            request_signer,
        )


def _encoded(key: str) -> str:
    """As boto3 writes it in a URL."""
    return quote(key, safe="/~")


def _range_of(start: int, size: int | None) -> dict[str, str]:
    return {"Range": f"bytes={start}-{'' if size is None else start + size - 1}"}


def _parsed(answer: AWSResponse) -> dict[str, Any]:
    headers = {"ETag": "ETag", "ContentRange": "Content-Range"}
    found = {name: answer.headers[header] for name, header in headers.items() if header in answer.headers}
    return {**found, "Body": StreamingBody(answer.raw, answer.headers.get("Content-Length"))}


@contextmanager
def _body_of(found: Mapping[str, Any]) -> Iterator[Any]:
    """An answer's body, to be read.

    Raises:
        BotoCoreError: it breaks off; botocore itself does not translate errors of TLS.
    """
    try:
        with closing(found["Body"]) as body:
            yield body
    except HTTPError as exc:
        raise failures.ResponseStreamingError(error=exc) from exc


def _write(found: Mapping[str, Any], target: Path, start: int) -> None:
    """Writes what comes into a file that is there, from byte `start` on."""
    with _body_of(found) as body, open(target, "r+b") as file:
        file.seek(start)
        shutil.copyfileobj(body, file, BUFFER_BYTES)
