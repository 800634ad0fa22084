"""A store in object storage: any S3-compatible service, through boto3.

    s3://bucket/prefix?owner=123456789012&encryption=aws:kms&kms_key=KEY&storage_class=STANDARD_IA

Endpoint, region and credentials come by the standard chain (AWS_ENDPOINT_URL_S3, AWS_REGION, profiles,
roles): nothing of ours, and no secret in a plan. Races are decided by `If-None-Match: *` alone, the one
condition that every service keeps. Integrity is the ledger's, by hashes of its own, so that a service's
checksum headers are used only where it demands them.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import botocore.exceptions as failures
from boto3.s3.transfer import TransferConfig

from btm_cluster.errors import StoreError, UserError
from btm_cluster.storage.node_cache import node_cache
from btm_cluster.storage.port import Entry, check_key, check_prefix
from btm_cluster.storage.s3_client import new_client
from btm_cluster.storage.s3_errors import FAILURES, code_of, is_transient, store_error
from btm_cluster.storage.s3_location import parse_location
from btm_cluster.storage.s3_patience import PATIENCE_SECONDS, Patience
from btm_cluster.storage.s3_reads import PART_BYTES, THREADS, ObjectReads

IN_PARTS_FROM_BYTES = 2 * PART_BYTES
"""Smaller files are uploaded in one request without s3transfer, whose threads for each file took a fifth of the
CPU time of an upload of 1 MiB. s3transfer streams parts: four files at once were measured at 129 MiB, imports and
all."""
_UPLOAD = "?uploadId="
"""Between the key and the id of an upload in parts, as in the address of one."""
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}")
_TAKEN = {"PreconditionFailed", "412"}
Result = TypeVar("Result")


class ObjectStorage:
    """Adapter of the storage port for S3-compatible object storage."""

    def __init__(self, location: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.location = location
        self._bucket, self._prefix, options = parse_location(location)
        self._attempt = Patience(location, patience_seconds).attempt
        self._always = {"ExpectedBucketOwner": options["owner"]} if "owner" in options else {}
        names = {
            "encryption": "ServerSideEncryption",
            "kms_key": "SSEKMSKeyId",
            "storage_class": "StorageClass",
        }
        self._written = self._always | {names[name]: options[name] for name in names if name in options}
        self._cache = node_cache()
        self._making = Lock()
        self._made: ObjectReads | None = None

    @property
    def copies_bytes(self) -> int:
        return self._cache.limit_bytes

    def check(self) -> None:
        """One listing. Waits out an outage; what only the user can mend is refused at once."""

        def list_one() -> None:
            try:
                self._client.list_objects_v2(**self._here, MaxKeys=1, Prefix=self._prefix)
            except (*FAILURES, ValueError) as exc:  # ValueError: an endpoint that is no URL
                if is_transient(exc):
                    raise
                error = store_error("list", "", self.location, exc)
                raise UserError(
                    f"the store {self.location} cannot be used",
                    found=error.found,
                    expected="a bucket that answers to the credentials boto3 finds",
                    remedy=error.remedy,
                ) from exc

        self._cache.check()
        self._attempt("list", "", list_one)

    def create(self, key: str, data: bytes) -> bool:
        check_key("create", key)

        def put() -> bool:
            try:
                self._client.put_object(**self._at(key), **self._written, Body=data, IfNoneMatch="*")
            except failures.ClientError as exc:
                if code_of(exc) in _TAKEN:
                    return False
                raise
            return True

        return self._attempt("create", key, put)

    def upload(self, key: str, path: Path, keep: bool = True) -> None:  # noqa: ARG002 - it is sent
        check_key("upload", key)

        def put() -> None:
            if path.stat().st_size >= IN_PARTS_FROM_BYTES:
                self._client.upload_file(
                    str(path), **self._at(key), ExtraArgs=dict(self._written), Config=_transfers()
                )
                return
            with open(path, "rb") as file:
                self._client.put_object(**self._at(key), **self._written, Body=file)

        try:
            self._attempt("upload", key, put)
        except OSError as exc:
            raise StoreError(f"cannot upload {key} from {path}", found=str(exc)) from exc

    def read(self, key: str, start: int = 0, size: int | None = None) -> bytes:
        check_key("read", key)
        if size == 0:
            return b""
        return self._attempt("read", key, lambda: self._reads.read(self._prefix + key, start, size))

    def download(self, key: str, anew: bool = False) -> Path:
        def fetch(target: Path) -> None:
            self._attempt("download", key, lambda: self._reads.download(self._prefix + key, target))

        check_key("download", key)
        return self._cache.get(self._cached_name(key), fetch, anew)

    def size(self, key: str) -> int:
        check_key("look up", key)

        def head() -> int:
            return int(self._client.head_object(**self._at(key), **self._always)["ContentLength"])

        return self._attempt("look up", key, head)

    def unfinished(self, prefix: str) -> Iterator[Entry]:
        check_prefix("list", prefix)
        markers: dict[str, str] = {}
        while True:
            request = {**self._here, **markers, "Prefix": self._prefix + prefix}
            page = self._attempt("list", prefix, partial(self._client.list_multipart_uploads, **request))
            for upload in page.get("Uploads", ()):
                key = upload["Key"].removeprefix(self._prefix)
                size = self._uploaded(upload["Key"], upload["UploadId"])
                yield Entry(f"{key}{_UPLOAD}{upload['UploadId']}", size, upload["Initiated"].timestamp())
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def discard(self, key: str) -> None:
        name, _, upload = key.rpartition(_UPLOAD)
        abort = partial(
            self._client.abort_multipart_upload, **self._at(name), **self._always, UploadId=upload
        )
        self._attempt_unless_gone("delete", name, abort)

    def _uploaded(self, key: str, upload: str) -> int:
        """Bytes of an upload in parts that are there so far."""
        size, markers = 0, dict[str, int]()
        while True:
            page: dict[str, Any]
            request = {"Bucket": self._bucket, **self._always, **markers, "Key": key, "UploadId": upload}
            page = self._attempt_unless_gone("list", key, partial(self._client.list_parts, **request)) or {}
            size += sum(int(part["Size"]) for part in page.get("Parts", ()))
            if not page.get("IsTruncated"):
                return size
            markers = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _attempt_unless_gone(self, verb: str, key: str, act: Callable[[], Result]) -> Result | None:
        """As `_attempt`; None where the upload in parts has ended since it was listed."""

        def attempt() -> Result | None:
            try:
                return act()
            except failures.ClientError as exc:
                if code_of(exc) == "NoSuchUpload":
                    return None
                raise

        return self._attempt(verb, key, attempt)

    def list(self, prefix: str) -> Iterator[Entry]:
        check_key("list", prefix)
        token: dict[str, Any] = {}
        while True:
            request = {**self._here, **token, "Prefix": self._prefix + prefix}
            page = self._attempt("list", prefix, partial(self._client.list_objects_v2, **request))
            for item in page.get("Contents", ()):
                yield Entry(
                    item["Key"].removeprefix(self._prefix), item["Size"], item["LastModified"].timestamp()
                )
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        check_key("delete", key)
        self._attempt("delete", key, lambda: self._client.delete_object(**self._at(key), **self._always))

    def erase_object(self, key: str) -> None:
        check_key("erase", key)
        self._erase_versions(key, lambda found: found == key)

    def erase(self, prefix: str) -> None:
        check_prefix("erase", prefix)
        self._erase_versions(prefix, lambda _: True)
        for upload in self.unfinished(prefix) if prefix.endswith("/") else ():
            self.discard(upload.key)

    def _erase_versions(self, prefix: str, is_wanted: Callable[[str], bool]) -> None:
        """Every version of the wanted ones among the keys that start with a prefix."""
        markers: dict[str, str] = {}
        while True:
            request = {**self._here, **markers, "Prefix": self._prefix + prefix}
            page = self._attempt("erase", prefix, partial(self._client.list_object_versions, **request))
            for version in (*page.get("Versions", ()), *page.get("DeleteMarkers", ())):
                key = version["Key"].removeprefix(self._prefix)
                if not is_wanted(key):
                    continue
                which = {**self._at(key), **self._always, "VersionId": version["VersionId"]}
                self._attempt("erase", key, partial(self._client.delete_object, **which))
                self._cache.drop(self._cached_name(key))
            if not page.get("IsTruncated"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"]}
            if "NextVersionIdMarker" in page:
                markers["VersionIdMarker"] = page["NextVersionIdMarker"]

    def address(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    @property
    def _client(self) -> Any:
        return self._reads.client

    @property
    def _reads(self) -> ObjectReads:
        """Made by the first of many threads that read."""
        with self._making:
            if self._made is None:
                self._made = ObjectReads(new_client(), self._bucket, self._always)
            return self._made

    @property
    def _here(self) -> dict[str, Any]:
        return {"Bucket": self._bucket, **self._always}

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _cached_name(self, key: str) -> str:
        """The name of the node's copy: the content's hash where the key ends in it."""
        name = key.rpartition("/")[2]
        return (
            name
            if _CONTENT_NAME.fullmatch(name)
            else hashlib.sha256(f"{self.location}\n{key}".encode()).hexdigest()
        )


def _transfers() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=IN_PARTS_FROM_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=THREADS,
        max_io_queue=THREADS,
    )
