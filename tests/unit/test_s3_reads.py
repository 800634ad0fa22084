"""Answers of a service that are not what was asked for, and bodies that break off."""

from pathlib import Path
from typing import Any

import botocore.exceptions as failures
import pytest
import urllib3.exceptions
from botocore.hooks import HierarchicalEmitter

from btm_cluster.storage.s3_errors import is_transient
from btm_cluster.storage.s3_reads import ObjectReads


class Body:
    """A body of some bytes, or one whose connection fails."""

    def __init__(self, data: bytes = b"", failure: Exception | None = None) -> None:
        self._data, self._failure = data, failure

    def read(self, size: int = -1) -> bytes:
        if self._failure is not None:
            raise self._failure
        end = len(self._data) if size < 0 else size
        data, self._data = self._data[:end], self._data[end:]
        return data

    def close(self) -> None:
        pass


class Client:
    """boto3's client, as far as it is asked here: it gives one answer to all."""

    def __init__(self, answer: Any) -> None:
        self.meta, self.events, self._answer = self, HierarchicalEmitter(), answer

    def get_object(self, **_: Any) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def reads(answer: Any) -> ObjectReads:
    return ObjectReads(Client(answer), "bucket", {})


def test_a_connection_that_fails_under_a_body_is_an_error_that_is_tried_again(tmp_path: Path) -> None:
    failure = urllib3.exceptions.SSLError("bad record mac")
    for read in (lambda one: one.read("k"), lambda one: one.download("k", tmp_path / "k")):
        with pytest.raises(failures.ResponseStreamingError, match="bad record mac") as raised:
            read(reads({"Body": Body(failure=failure)}))
        assert is_transient(raised.value)


@pytest.mark.parametrize("code", ["InvalidRange", "RequestedRangeNotSatisfiable", ""])
def test_a_range_behind_the_end_is_empty_whatever_the_service_calls_it(code: str, tmp_path: Path) -> None:
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 416}}
    service = reads(failures.ClientError(response, "GetObject"))
    assert service.read("k", 8, 8) == b""
    service.download("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == b""


@pytest.mark.parametrize("part", [{}, {"ContentRange": "bytes 0-3/4"}])
def test_other_bytes_than_were_asked_for_are_not_taken(part: dict[str, str]) -> None:
    with pytest.raises(failures.ResponseStreamingError, match="not the bytes from 2 on") as raised:
        reads({"Body": Body(b"text"), **part}).read("k", 2, 2)
    assert is_transient(raised.value)
    assert reads({"Body": Body(b"xt"), "ContentRange": "bytes 2-3/4"}).read("k", 2, 2) == b"xt"
    assert reads({"Body": Body(b"text")}).read("k") == b"text"
