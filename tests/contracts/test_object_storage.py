"""Object storage when things go wrong: radosgw behind a proxy that makes
faults, by a clock that only pauses move."""

import gc
import hashlib
import json
import logging
import random
import traceback
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.handlers
import moto
import pytest
from botocore.stub import Stubber

from btm_cluster.errors import MissingError, StoreError, UserError
from btm_cluster.forest import Forest, Foundation
from btm_cluster.ledger import CHUNK_BYTES, Ledger, in_parallel
from btm_cluster.storage import open_storage
from btm_cluster.storage.object_storage import ObjectStorage
from btm_cluster.storage.s3_client import new_client
from tests.fault_proxy import SURVIVED, Fault, FaultProxy, no_faults, on_first_try, random_faults
from tests.made import origin

MULTI_PART = random.Random(0).randbytes(20 * 2**20 + 5)
BLOB = f"blobs/{hashlib.sha256(MULTI_PART).hexdigest()}"
FOUNDED = Forest(
    0, Foundation("seed", "tokenizer", "model", 1024, (("code", "text"),)), (), {"seed": "hash"}, "founded"
)
OUTAGE_SECONDS = 20.0
"""On the clock of these tests: longer than boto3 tries, which pauses for 1, 2, 4 and 8 seconds at most."""


class Clock:
    """Stands in for the module `time`: a pause moves it and takes none."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses = 0
        self.at_pause: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1
        self.at_pause()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The adapter's clock, and that of boto3's retries."""
    clock = Clock()
    monkeypatch.setattr("btm_cluster.storage.s3_patience.time", clock)
    monkeypatch.setattr("botocore.endpoint.time", clock)
    return clock


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without anything of AWS, be it a variable, a file or a metadata service."""
    for name in ("PROFILE", "REGION", "ENDPOINT_URL_S3", "SESSION_TOKEN", "ROLE_ARN", "WEB_IDENTITY_TOKEN_FILE",
        "CONTAINER_CREDENTIALS_RELATIVE_URI", "CONTAINER_CREDENTIALS_FULL_URI", "ENDPOINT_URL", "DEFAULT_REGION",
        "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_PROFILE"):  # fmt: skip
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    return monkeypatch


@pytest.fixture(scope="module")
def server(object_store: Mapping[str, str]) -> Any:
    """A client that goes straight to the server, around the proxy."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=object_store["AWS_ENDPOINT_URL"],
        aws_access_key_id=object_store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=object_store["AWS_SECRET_ACCESS_KEY"],
        region_name=object_store["AWS_DEFAULT_REGION"],
    )


@pytest.fixture(scope="module")
def bucket(server: Any) -> str:
    """A bucket in which each test has a prefix of its own."""
    server.create_bucket(Bucket="faults")
    return "faults"


@pytest.fixture
def proxy(object_store: Mapping[str, str], bare: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Where boto3 finds the server while a test lasts."""
    with FaultProxy(object_store["AWS_ENDPOINT_URL"]) as proxy:
        for name, value in (object_store | {"AWS_ENDPOINT_URL": proxy.url}).items():
            bare.setenv(name, value)
        yield proxy


@pytest.fixture
def storage(proxy: FaultProxy, clock: Clock, bucket: str) -> ObjectStorage:  # noqa: ARG001 - they surround it
    """An empty store behind the proxy, with a minute's patience."""
    return ObjectStorage(f"s3://{bucket}/{uuid.uuid4().hex}", patience_seconds=60)


@pytest.fixture
def competitor(storage: ObjectStorage, object_store: Mapping[str, str], bare: pytest.MonkeyPatch) -> Ledger:
    """Somebody else's ledger on the same store, who has no faults."""
    ledger = Ledger.open(storage.location)
    with bare.context() as straight:
        straight.setenv("AWS_ENDPOINT_URL", object_store["AWS_ENDPOINT_URL"])
        ledger.storage.check()
    return ledger


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a local file to upload."""

    def write(data: bytes) -> Path:
        path = tmp_path / uuid.uuid4().hex
        path.write_bytes(data)
        return path

    return write


def keys(storage: ObjectStorage, prefix: str = "") -> list[str]:
    return [entry.key for entry in storage.list(prefix)]


# Faults: an operation gives what is left to check once the faults are over


def _create(storage: ObjectStorage, file: Callable[[bytes], Path]) -> Callable[[], None]:  # noqa: ARG001
    def check() -> None:
        assert storage.read("forest/000001.json") == b"new"

    # What it says once an answer was lost is the ledger's to settle.
    storage.create("forest/000001.json", b"new")
    return check


def _upload(storage: ObjectStorage, file: Callable[[bytes], Path]) -> Callable[[], None]:
    def check() -> None:
        assert storage.read("blobs/small") == b"small"

    storage.upload("blobs/small", file(b"small"))
    return check


def _upload_in_parts(storage: ObjectStorage, file: Callable[[bytes], Path]) -> Callable[[], None]:
    def check() -> None:
        assert storage.read("blobs/large") == MULTI_PART

    storage.upload("blobs/large", file(MULTI_PART))
    return check


def _read(storage: ObjectStorage, file: Callable[[bytes], Path]) -> None:  # noqa: ARG001
    assert storage.read(BLOB) == MULTI_PART


def _read_range(storage: ObjectStorage, file: Callable[[bytes], Path]) -> None:  # noqa: ARG001
    assert storage.read(BLOB, 2**20, 3 * 2**20) == MULTI_PART[2**20 : 4 * 2**20]


def _download(storage: ObjectStorage, file: Callable[[bytes], Path]) -> None:  # noqa: ARG001
    assert storage.download(BLOB).read_bytes() == MULTI_PART


def _list(storage: ObjectStorage, file: Callable[[bytes], Path]) -> None:  # noqa: ARG001
    assert keys(storage) == [BLOB, "training/1.json"]


def _delete(storage: ObjectStorage, file: Callable[[bytes], Path]) -> Callable[[], None]:  # noqa: ARG001
    def check() -> None:
        assert keys(storage) == [BLOB]

    storage.delete("training/1.json")
    return check


# In this order.
OPERATIONS = [_read, _read_range, _download, _list, _delete, _create, _upload, _upload_in_parts]


@pytest.fixture(scope="module")
def large(server: Any, bucket: str) -> str:
    """The key of a large object in the bucket, to be copied."""
    server.put_object(Bucket=bucket, Key="large", Body=MULTI_PART)
    return "large"


@pytest.fixture
def filled(storage: ObjectStorage, server: Any, bucket: str, large: str) -> ObjectStorage:
    """A store with a large object and a small one."""
    prefix = storage.location.rpartition("/")[2]
    server.copy_object(Bucket=bucket, Key=f"{prefix}/{BLOB}", CopySource={"Bucket": bucket, "Key": large})
    storage.create("training/1.json", b"1")
    return storage


@pytest.mark.parametrize("fault", SURVIVED, ids=lambda fault: fault.name)
def test_every_operation_survives_a_fault_at_each_of_its_requests(
    filled: ObjectStorage, proxy: FaultProxy, clock: Clock, file: Callable[[bytes], Path], fault: Fault
) -> None:
    clock.at_pause = proxy.accept
    for operate in OPERATIONS:
        proxy.follow(on_first_try(fault))
        check = operate(filled, file)
        assert fault in {met for _, _, met in proxy.seen}
        proxy.follow(no_faults)
        if check:
            check()


def test_every_operation_survives_an_outage_that_outlasts_the_tries_of_boto3(
    filled: ObjectStorage, proxy: FaultProxy, clock: Clock, file: Callable[[bytes], Path]
) -> None:
    proxy.follow(lambda *_: Fault.ERROR if clock.now < OUTAGE_SECONDS else Fault.NONE)
    for operate in OPERATIONS:
        clock.now = 0.0
        check = operate(filled, file)
        assert clock.now >= OUTAGE_SECONDS
        if check:
            check()


def test_every_operation_survives_a_server_that_refuses_connections_for_longer_than_boto3_tries(
    filled: ObjectStorage, proxy: FaultProxy, clock: Clock, file: Callable[[bytes], Path]
) -> None:
    # Once failed at the first round: EndpointConnectionError is no HTTPClientError, and was not taken for an
    # outage.
    clock.at_pause = lambda: proxy.accept() if clock.now >= OUTAGE_SECONDS else None
    for operate in OPERATIONS:
        clock.now = 0.0
        proxy.refuse()
        check = operate(filled, file)
        assert clock.now >= OUTAGE_SECONDS
        if check:
            check()


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, None], ids=["500", "SlowDown", "refused"])
def test_a_store_that_is_out_for_longer_than_its_patience_fails_with_an_error_that_names_it(
    filled: ObjectStorage, proxy: FaultProxy, clock: Clock, file: Callable[[bytes], Path], fault: Fault | None
) -> None:
    if fault is None:
        proxy.refuse()
    else:
        proxy.follow(lambda *_: fault)
    for operate in OPERATIONS:
        clock.now = 0.0
        with pytest.raises(StoreError) as failed:
            operate(filled, file)
        assert not isinstance(failed.value, MissingError)
        assert filled.location in str(failed.value)
        assert "goes on" in failed.value.remedy
        assert clock.now > 40  # a minute's patience, less the longest pause


def test_checking_a_store_waits_out_an_outage_as_every_operation_does(
    storage: ObjectStorage, proxy: FaultProxy, clock: Clock
) -> None:
    # Once it had no patience: a driver that was started while the store was out for seconds was told to mend
    # its plan.
    proxy.follow(lambda *_: Fault.ERROR if clock.now < OUTAGE_SECONDS else Fault.NONE)
    storage.check()
    assert clock.now >= OUTAGE_SECONDS
    clock.now = 0.0
    clock.at_pause = lambda: proxy.accept() if clock.now >= OUTAGE_SECONDS else None
    proxy.refuse()
    storage.check()
    assert clock.now >= OUTAGE_SECONDS
    clock.at_pause = lambda: None
    proxy.refuse()
    with pytest.raises(StoreError) as failed:
        storage.check()
    assert storage.location in str(failed.value)
    assert proxy.url in failed.value.found
    assert "goes on" in failed.value.remedy


def test_an_upload_that_fails_leaves_neither_object_nor_parts(
    proxy: FaultProxy, clock: Clock, bucket: str, server: Any, file: Callable[[bytes], Path]
) -> None:
    storage = ObjectStorage(f"s3://{bucket}/{uuid.uuid4().hex}", patience_seconds=5)
    clock.at_pause = lambda: None
    proxy.follow(lambda _method, path, _count: Fault.ERROR if "partNumber=2" in path else Fault.NONE)
    with pytest.raises(StoreError):
        storage.upload(BLOB, file(MULTI_PART))
    assert keys(storage) == []
    assert "Uploads" not in server.list_multipart_uploads(
        Bucket=bucket, Prefix=storage.location.rpartition("/")[2]
    )


def test_an_upload_that_the_service_forgot_under_way_is_started_anew(
    storage: ObjectStorage, proxy: FaultProxy, server: Any, bucket: str, file: Callable[[bytes], Path]
) -> None:
    # By a lifecycle rule, or after a lost answer to its completion where a second one is refused.
    forgotten = []

    def forget(method: str, path: str, count: int) -> Fault:  # noqa: ARG001 - a Policy
        if "partNumber=2" in path and not forgotten:
            (upload,) = server.list_multipart_uploads(
                Bucket=bucket, Prefix=storage.location.rpartition("/")[2]
            )["Uploads"]
            server.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            forgotten.append(upload)
        return Fault.NONE

    proxy.follow(forget)
    storage.upload(BLOB, file(MULTI_PART))
    assert storage.read(BLOB) == MULTI_PART


@pytest.mark.parametrize("size", [len(MULTI_PART), 10 * 2**20, 3], ids=lambda size: f"{size} bytes")
@pytest.mark.parametrize("before", [2, 3], ids=lambda before: f"before request {before}")
def test_an_object_that_is_replaced_while_it_is_downloaded_comes_whole(
    storage: ObjectStorage,
    competitor: Ledger,
    proxy: FaultProxy,
    file: Callable[[bytes], Path],
    before: int,
    size: int,
) -> None:
    # Every part but the first is asked for with If-Match: the next answer is 412.
    other = file(MULTI_PART[::-1][:size])
    storage.upload(BLOB, file(MULTI_PART))

    def replace(method: str, path: str, count: int) -> Fault:  # noqa: ARG001 - a Policy
        if method == "GET" and sum(method == "GET" for method, _, _ in proxy.seen) == before - 1:
            competitor.storage.upload(BLOB, other)
        return Fault.NONE

    proxy.follow(replace)
    assert storage.download(BLOB).read_bytes() == MULTI_PART[::-1][:size]


# The ledger decides who won when answers are lost


def test_who_creates_a_version_and_loses_the_answer_learns_that_it_won(
    storage: ObjectStorage, competitor: Ledger, proxy: FaultProxy
) -> None:
    ledger = Ledger(storage)
    proxy.follow(on_first_try(Fault.LOSE_REPLY, "PUT"))
    assert ledger.log.append(FOUNDED)
    assert [fault for method, _, fault in proxy.seen if method == "PUT"] == [Fault.LOSE_REPLY, Fault.NONE]
    assert not competitor.log.append(FOUNDED)
    assert competitor.log.newest() == ledger.log.newest() == FOUNDED


def test_a_lost_answer_is_settled_also_after_an_outage(
    storage: ObjectStorage, competitor: Ledger, proxy: FaultProxy
) -> None:
    def lose_then_fail(method: str, path: str, count: int) -> Fault:  # noqa: ARG001 - a Policy
        return Fault.NONE if method != "PUT" or count > 7 else Fault.ERROR if count > 1 else Fault.LOSE_REPLY

    proxy.follow(lose_then_fail)
    assert Ledger(storage).log.append(FOUNDED)
    assert not competitor.log.append(FOUNDED)


def test_who_is_overtaken_between_two_tries_learns_that_it_lost(
    storage: ObjectStorage, competitor: Ledger, proxy: FaultProxy
) -> None:
    won = []

    def overtake(method: str, path: str, count: int) -> Fault:  # noqa: ARG001 - a Policy
        if method == "PUT" and not won:
            won.append(competitor.log.append(FOUNDED))
            return Fault.RESET
        return Fault.NONE

    proxy.follow(overtake)
    assert not Ledger(storage).log.append(FOUNDED)
    assert won == [True]


@pytest.mark.races
def test_of_many_whose_answers_are_lost_exactly_one_learns_that_it_won(
    storage: ObjectStorage, proxy: FaultProxy
) -> None:
    lost = iter(range(1000))
    proxy.follow(lambda method, *_: Fault.LOSE_REPLY if method == "PUT" and next(lost) % 2 else Fault.NONE)
    ledgers = [Ledger(ObjectStorage(storage.location)) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda ledger: ledger.log.append(FOUNDED), ledgers)).count(True) == 1


@pytest.mark.parametrize("seed", range(2))
def test_what_is_committed_and_opened_through_random_faults_is_right(
    proxy: FaultProxy, clock: Clock, bucket: str, file: Callable[[bytes], Path], seed: int
) -> None:
    clock.at_pause = proxy.accept
    # Paths decide the draws.
    ledger = Ledger(ObjectStorage(f"s3://{bucket}/random-{seed}", patience_seconds=1e6))
    proxy.follow(random_faults(seed, rate=0.3))
    for number in range(5):
        files = {"weights": file(MULTI_PART if number == 0 else b"%d" % number), "empty": file(b"")}
        artifact = ledger.commit(origin("model", {"number": number}), files, {})
        assert ledger.get(artifact.ref) == artifact
        for name, path in files.items():
            assert ledger.open_file(artifact, name).read_bytes() == path.read_bytes()
            assert b"".join(ledger.read_chunks(artifact, name)) == path.read_bytes()
    assert len({*proxy.seen}) > 30
    assert {fault for _, _, fault in proxy.seen} > {Fault.NONE, Fault.LOSE_REPLY}
    made = sorted(origin("model", {"number": number}).ref.identity for number in range(5))
    assert [found.identity for found in ledger.list_artifacts("model")] == made


# Reads are signed and sent without boto3's layers, once boto3 has shown how


@pytest.fixture
def asked_of_boto3(storage: ObjectStorage) -> list[str]:
    """The calls of boto3's `get_object` so far."""
    calls: list[str] = []
    storage._client.meta.events.register(
        "before-call.s3.GetObject", lambda model, **_: calls.append(model.name)
    )
    return calls


def gets(proxy: FaultProxy) -> int:
    return sum(method == "GET" for method, _, _ in proxy.seen)


def test_boto3_serves_the_first_read_and_no_other(
    filled: ObjectStorage, proxy: FaultProxy, asked_of_boto3: list[str]
) -> None:
    for key in AWKWARD:
        filled.create(key, key.encode())
    proxy.follow(no_faults)
    for key in AWKWARD:
        assert filled.read(key) == filled.read(key, 0, 2000) == key.encode()
        assert filled.read(key, 1, 1) == key.encode()[1:2]
    assert (len(asked_of_boto3), gets(proxy)) == (1, 3 * len(AWKWARD))
    assert filled.download(BLOB).read_bytes() == MULTI_PART
    assert (len(asked_of_boto3), gets(proxy)) == (1, 3 * len(AWKWARD) + 3)


def test_an_object_that_is_not_there_takes_one_request(
    filled: ObjectStorage, proxy: FaultProxy, asked_of_boto3: list[str]
) -> None:
    filled.read("training/1.json")
    proxy.follow(no_faults)
    for operate in (filled.read, filled.download):
        with pytest.raises(MissingError, match=r"cannot .* training/2"):
            operate("training/2.json")
    assert (len(asked_of_boto3), gets(proxy)) == (1, 2)


def test_boto3_is_asked_where_an_answer_is_not_plain(
    filled: ObjectStorage, proxy: FaultProxy, asked_of_boto3: list[str]
) -> None:
    for number, fault in enumerate((Fault.NONE, Fault.ERROR, Fault.SLOW_DOWN, Fault.LOSE_REPLY), 1):
        proxy.follow(on_first_try(fault))
        assert filled.read("training/1.json") == b"1"
        assert len(asked_of_boto3) == number
        proxy.follow(no_faults)
        assert filled.read("training/1.json") == b"1"
        assert len(asked_of_boto3) == number


def test_a_service_that_was_busy_is_read_as_fast_as_before(
    filled: ObjectStorage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3's adaptive mode would ration requests from then on, by the rate of those that it made itself."""
    rationed: list[object] = []
    monkeypatch.setattr(
        "botocore.retries.bucket.TokenBucket.acquire", lambda *_, **__: rationed.append(1) or True
    )
    proxy.follow(lambda _method, _path, count: Fault.SLOW_DOWN if count <= 4 else Fault.NONE)
    for _ in range(10):
        assert filled.read("training/1.json") == b"1"
    assert [fault for _, _, fault in proxy.seen].count(Fault.SLOW_DOWN) == 4
    assert rationed == []


def test_a_store_that_nobody_has_any_more_keeps_no_connection(filled: ObjectStorage) -> None:
    other = ObjectStorage(filled.location)
    other.read("training/1.json")
    client = weakref.ref(other._client)
    gc.disable()  # what refers to itself would wait for a collection
    try:
        del other
        assert client() is None
    finally:
        gc.enable()


def test_a_part_that_breaks_off_is_asked_for_again_alone(
    filled: ObjectStorage, proxy: FaultProxy, clock: Clock
) -> None:
    filled.read("training/1.json")
    proxy.follow(lambda *_: Fault.TRUNCATE if gets(proxy) == 2 else Fault.NONE)
    assert filled.download(BLOB).read_bytes() == MULTI_PART
    assert gets(proxy) == 4
    assert clock.pauses == 0


def test_reads_follow_credentials_that_are_renewed(
    filled: ObjectStorage, bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Those of a role expire within hours. These are always about to.
    given, times = tmp_path / "given", tmp_path / "times"
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = sh -c 'echo x >> {times}; cat {given}'\n")
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()

    def give(secret: str) -> None:
        keys = {"AccessKeyId": "btmkey", "SecretAccessKey": secret, "SessionToken": None}
        given.write_text(json.dumps({"Version": 1, "Expiration": soon} | keys))

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        bare.delenv(name)
    bare.setenv("AWS_CONFIG_FILE", str(config))
    storage = ObjectStorage(filled.location)
    give("btmsecret")
    for _ in range(3):
        assert storage.read("training/1.json") == b"1"
    assert len(times.read_text().split()) >= 3
    give(SECRET)
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        storage.read("training/1.json")


def test_many_threads_that_read_first_share_one_client(
    filled: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def count() -> Any:
        made.append(new_client())
        return made[-1]

    monkeypatch.setattr("btm_cluster.storage.object_storage.new_client", count)
    storage = ObjectStorage(filled.location)
    assert set(in_parallel(storage.read, ["training/1.json"] * 50)) == {b"1"}
    assert len(made) == 1


# Sizes, ranges, names, pages


def test_a_large_object_goes_in_parts_and_its_ranges_are_those_of_the_bytes(
    storage: ObjectStorage, proxy: FaultProxy, file: Callable[[bytes], Path]
) -> None:
    storage.upload(BLOB, file(MULTI_PART))
    assert len({path for method, path, _ in proxy.seen if method == "PUT" and "partNumber=" in path}) == 3
    end = len(MULTI_PART)
    for start, size in [
        (0, None), (7, None), (0, 1), (0, end), (0, end + 1), (5, 0), (CHUNK_BYTES - 1, 2), (CHUNK_BYTES, CHUNK_BYTES),
        (2 * CHUNK_BYTES, CHUNK_BYTES), (end - 1, 1), (end - 1, 10), (end, 1), (end, None), (end + 9, 9), (10 * end, 1),
    ]:  # fmt: skip
        assert storage.read(BLOB, start, size) == MULTI_PART[start : None if size is None else start + size]
    assert storage.download(BLOB).read_bytes() == MULTI_PART


def test_an_empty_object_is_an_object(storage: ObjectStorage, file: Callable[[bytes], Path]) -> None:
    assert storage.create("created", b"")
    assert not storage.create("created", b"more")
    storage.upload("uploaded", file(b""))
    for key in ("created", "uploaded"):
        assert (
            storage.read(key)
            == storage.read(key, 0, 5)
            == storage.read(key, 3)
            == storage.read(key, 0, 0)
            == b""
        )
        assert storage.download(key).read_bytes() == b""
    assert [(entry.key, entry.size_bytes) for entry in storage.list("")] == [("created", 0), ("uploaded", 0)]


AWKWARD = [
    "ä ö/語.json", "emoji/🌲", "a+b&c=d;e", "per%20cent", "question?hash#", "quotes'\"<>", "two  spaces ", "a//b",
    "e\u0301", "\u00e9", "dots.../..a", "back\\slash", "~tilde", "x" * 900, "語" * 300, "/".join(["name"] * 180),
]  # fmt: skip


@pytest.mark.parametrize("prefix", ["ä+präfix & 語", "per%2520cent%23/many/"])
def test_keys_and_prefixes_of_any_characters_and_length_keep_their_names(
    proxy: FaultProxy,  # noqa: ARG001 - which leads to the server
    clock: Clock,  # noqa: ARG001 - no waiting where a key is refused
    bucket: str,
    file: Callable[[bytes], Path],
    prefix: str,
) -> None:
    storage = ObjectStorage(f"s3://{bucket}/{uuid.uuid4().hex}/{prefix}", patience_seconds=1)
    storage.check()
    for i, key in enumerate(AWKWARD):
        if i % 2:
            assert storage.create(key, key.encode())
        else:
            storage.upload(key, file(key.encode()))
    assert keys(storage) == sorted(AWKWARD)
    for key in AWKWARD:
        assert storage.read(key) == storage.download(key).read_bytes() == key.encode()
        assert keys(storage, key) == [key]
    again = open_storage(storage.location)
    for key in AWKWARD:
        again.delete(key)
    assert keys(storage) == []


def test_stores_in_one_bucket_do_not_see_each_other(proxy: FaultProxy, bucket: str) -> None:  # noqa: ARG001
    name = uuid.uuid4().hex
    one, longer, below = (ObjectStorage(f"s3://{bucket}/{name}{rest}") for rest in ("/a", "/ab", "/a/b"))
    one.create("x", b"one")
    longer.create("x", b"longer")
    below.create("x", b"below")
    assert keys(longer) == keys(below) == ["x"]
    assert keys(one) == ["b/x", "x"]
    assert (one.read("x"), longer.read("x"), below.read("x")) == (b"one", b"longer", b"below")


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.TRUNCATE, Fault.RESET], ids=lambda fault: fault.name)
def test_more_than_a_page_is_listed_once_and_by_key_though_the_second_page_meets_faults(
    thousands: ObjectStorage, proxy: FaultProxy, fault: Fault
) -> None:
    proxy.follow(on_first_try(fault, "GET", "continuation-token="))
    listed = keys(thousands, "artifacts/")
    assert listed == [f"artifacts/{number:05d}.json" for number in range(1001)]
    assert [met for _, _, met in proxy.seen] == [Fault.NONE, fault, Fault.NONE]


@pytest.fixture(scope="module")
def thousand(server: Any, bucket: str) -> str:
    """A prefix with one object more than a page holds."""
    prefix = uuid.uuid4().hex
    with ThreadPoolExecutor(8) as pool:
        put = [
            pool.submit(server.put_object, Bucket=bucket, Key=f"{prefix}/artifacts/{number:05d}.json")
            for number in range(1001)
        ]
    assert all(done.result() for done in put)
    return prefix


@pytest.fixture
def thousands(thousand: str, proxy: FaultProxy, clock: Clock, bucket: str) -> ObjectStorage:  # noqa: ARG001
    """The store there."""
    return ObjectStorage(f"s3://{bucket}/{thousand}")


# Who may use it


SECRET, KEY_ID = "a-secret-that-nobody-should-see", "AKIAKEYTHATNOBODYSHOULD"


@pytest.mark.parametrize(
    ("given", "bucket_name", "remedy"),
    [
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, None, "credentials"),
        ({"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}, None, "credentials"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, None, "credentials"),
        ({"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": None}, None, "credentials"),
        ({"AWS_PROFILE": "nobody"}, None, ""),
        ({"AWS_ENDPOINT_URL": "not a url"}, None, "endpoint"),
        ({}, "no-such-bucket", "create the bucket"),
        ({}, "No_Bucket_Has_Such_A_Name", ""),
    ],
    ids=[
        "wrong secret", "unknown key id", "no credentials", "half of the credentials", "no such profile",
        "endpoint that is no URL", "no such bucket", "impossible bucket",
    ],
)  # fmt: skip
def test_a_store_that_cannot_be_used_is_refused_with_a_remedy_and_without_the_credentials(
    proxy: FaultProxy,
    bare: pytest.MonkeyPatch,
    bucket: str,
    caplog: pytest.LogCaptureFixture,
    given: dict[str, str | None],
    bucket_name: str | None,
    remedy: str,
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in given.items():
        bare.delenv(name, raising=False) if value is None else bare.setenv(name, value)
    storage = ObjectStorage(f"s3://{bucket_name or bucket}/a")
    with pytest.raises(UserError) as refused:
        storage.check()
    error = refused.value
    assert storage.location in str(error)
    assert error.found
    assert error.remedy
    assert remedy in error.remedy
    told = f"{error} {error!r} {''.join(traceback.format_exception(error))} {caplog.text}"
    for secret in (SECRET, KEY_ID, "btmsecret", "btmkey"):
        assert secret not in told
    assert len(proxy.seen) <= 1  # what cannot get better is not tried again


def test_each_operation_is_refused_to_whom_may_not_without_the_secret(
    filled: ObjectStorage,
    bare: pytest.MonkeyPatch,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    file: Callable[[bytes], Path],
) -> None:
    caplog.set_level(logging.INFO)
    bare.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = ObjectStorage(filled.location)
    for operate in OPERATIONS:
        with pytest.raises(StoreError) as refused:
            operate(storage, file)
        told = f"{refused.value} {refused.value!r} {''.join(traceback.format_exception(refused.value))} {caplog.text}"
        assert not isinstance(refused.value, MissingError)
        assert "credentials" in refused.value.remedy
        assert SECRET not in told
        assert "btmkey" not in told
    assert clock.pauses == 0


# The URL


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://user:pass@bucket", ""),
        ("s3://user@bucket/prefix", ""),
        ("s3://bucket:9000/prefix", ""),
        ("s3://[bucket/prefix", ""),
        ("s3://bucket?region=eu-west-1", "region"),
        ("s3://bucket/prefix?Owner=1", "Owner"),
        ("s3://bucket/prefix?owner=", "value"),
        ("s3://bucket/prefix?owner", "value"),
        ("s3://bucket/prefix?owner=1&storage_class=", "value"),
        ("s3://bucket/prefix?owner=1&owner=2", "owner"),
        ("s3://bucket/prefix#part", ""),
    ],
)
def test_a_url_that_is_no_store_is_refused_naming_what_is_wrong(location: str, found: str) -> None:
    with pytest.raises(UserError) as refused:
        open_storage(location)
    assert found in refused.value.found
    assert refused.value.expected
    assert refused.value.remedy


@pytest.mark.parametrize(
    "location", [f"s3://{KEY_ID}:{SECRET}@bucket/prefix", f"s3://bucket?key={KEY_ID}&secret={SECRET}"]
)
def test_credentials_that_somebody_puts_into_the_url_are_refused_and_not_repeated(location: str) -> None:
    with pytest.raises(UserError) as refused:
        open_storage(location)
    told = f"{refused.value} {refused.value!r}"
    assert SECRET not in told
    assert KEY_ID not in told


OWNER, CLASS, METHOD, KMS = (
    "x-amz-expected-bucket-owner", "x-amz-storage-class", "x-amz-server-side-encryption",
    "x-amz-server-side-encryption-aws-kms-key-id",
)  # fmt: skip


def test_the_options_of_the_url_stand_in_every_request(
    bare: pytest.MonkeyPatch, file: Callable[[bytes], Path]
) -> None:
    requests: list[tuple[str, dict[str, str]]] = []

    def record(request: Any, **_: Any) -> None:
        headers = {name.lower(): str(value) for name, value in request.headers.items()}
        headers = {name: value.removeprefix("b'").removesuffix("'") for name, value in headers.items()}
        found = {name: headers[name] for name in (OWNER, CLASS, METHOD, KMS) if name in headers}
        requests.append((request.method, found))

    bare.setattr(
        botocore.handlers,
        "BUILTIN_HANDLERS",
        [*botocore.handlers.BUILTIN_HANDLERS, ("before-send.s3", record)],
    )
    with moto.mock_aws():
        boto3.session.Session().client("s3", region_name="us-east-1").create_bucket(Bucket="bucket")
        key = "arn:aws:kms:us-east-1:123456789012:key/a-b"
        storage = open_storage(
            f"s3://bucket/prefix?owner=123456789012&encryption=aws:kms&kms_key={key}&storage_class=STANDARD_IA"
        )
        owner = {OWNER: "123456789012"}
        written = owner | {METHOD: "aws:kms", KMS: key, CLASS: "STANDARD_IA"}

        def requests_of(operate: Callable[[], object]) -> list[tuple[str, dict[str, str]]]:
            requests.clear()
            operate()
            return requests

        assert requests_of(lambda: storage.create("a", b"1")) == [("PUT", written)]
        assert requests_of(lambda: storage.upload("b", file(b"2"))) == [("PUT", written)]
        in_parts = requests_of(lambda: storage.upload(BLOB, file(MULTI_PART)))
        assert in_parts[0] == ("POST", written)
        assert in_parts[1:] == [("PUT", owner)] * 3 + [("POST", owner)]
        for operate in (
            storage.check,
            lambda: storage.read("a"),
            lambda: storage.read("a", 0, 1),
            lambda: storage.download(BLOB),
            lambda: list(storage.list("")),
            lambda: storage.delete("a"),
        ):
            made = requests_of(operate)
            assert made
            assert all(options == owner for _, options in made)
        plain = open_storage("s3://bucket/prefix")
        assert requests_of(lambda: plain.create("a", b"1")) == [("PUT", {})]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("ExpiredToken", "renew the credentials; the same command goes on"),
        ("RequestTimeTooSkewed", "set this machine's clock"),
        ("AccessDenied", "allow these credentials"),
    ],
)
def test_what_the_service_refuses_in_mid_run_fails_at_once_with_the_remedy(
    code: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (tmp_path / "file").write_bytes(b"weights")
    storage = ObjectStorage("s3://bucket/prefix")
    with Stubber(storage._client) as service:
        for _ in range(2):
            service.add_client_error("put_object", code, "refused", 403)
        with pytest.raises(StoreError) as created:
            storage.create("forest/000001.json", b"{}")
        with pytest.raises(StoreError) as uploaded:
            storage.upload("blobs/0", tmp_path / "file")
        service.assert_no_pending_responses()  # neither was tried again
    for failed in (created, uploaded):
        assert code in str(failed.value)
        assert remedy in str(failed.value)
