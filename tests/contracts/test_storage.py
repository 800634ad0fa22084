"""What every adapter of the storage port must do. An adapter joins in the fixture `storage`."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import boto3
import moto
import pytest

from btm_cluster.errors import MissingError, StoreError, UserError
from btm_cluster.ledger import Ledger
from btm_cluster.ledger.purge import plan_purge, purge
from btm_cluster.operations.doctor import examine_store
from btm_cluster.operations.gc import collect, find_garbage
from btm_cluster.operations.study import open_place
from btm_cluster.operations.verify import verify
from btm_cluster.session import open_ledger
from btm_cluster.storage import Entry, Storage, open_storage
from btm_cluster.storage.local_folder import LocalFolder
from tests.house import House


@pytest.fixture(params=["local folder", "radosgw", "moto"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    """A fresh, empty store of each kind: a folder, a bucket of a real S3
    server, and one of a pretended one."""
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    if request.param == "local folder":
        yield open_storage(str(tmp_path / "store"))
        return
    with ExitStack() as stack:
        if request.param == "moto":
            if request.node.get_closest_marker("races"):
                pytest.skip(
                    "moto lets two racers win, reads half an object, and lists what another thread deletes"
                )
            given = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
            given["AWS_DEFAULT_REGION"] = "us-east-1"
            stack.enter_context(moto.mock_aws())
        else:
            given = request.getfixturevalue("object_store")
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{uuid.uuid4().hex}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield open_storage(f"s3://{bucket}/a prefix/of ours")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes a local file to upload."""
    count = iter(range(1000))

    def write(data: bytes) -> Path:
        path = tmp_path / f"to-upload-{next(count)}"
        path.write_bytes(data)
        return path

    return write


def test_a_folder_that_cannot_be_read_is_an_error_and_does_not_count_as_empty(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    storage.create("forest/0", b"a version")
    closed = tmp_path / "store" / "forest"
    closed.chmod(0)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # who is root reads everything
        with pytest.raises(StoreError, match="cannot list forest/"):
            list(storage.list("forest/"))
    finally:
        os.seteuid(user)
        closed.chmod(0o755)
    assert keys(storage, "forest/") == ["forest/0"]


def test_a_place_in_a_jobs_own_copy_of_its_working_directory_is_refused() -> None:
    place = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/forests"
    for open_at in (open_ledger, open_place):
        with pytest.raises(UserError, match="would be deleted with this job"):
            open_at(place)
    (check,) = examine_store(open_storage(place))
    assert (check.state, "would be deleted" in check.found) == ("wrong", True), check


def keys(storage: Storage, prefix: str) -> list[str]:
    return [entry.key for entry in storage.list(prefix)]


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(range(256)) * 4096, "ä – 語".encode()], ids=["empty", "byte", "1 MiB", "utf-8"]
)
def test_what_is_created_or_uploaded_is_read_back_byte_for_byte(
    storage: Storage, file: Callable[[bytes], Path], data: bytes
) -> None:
    assert storage.create("artifacts/model/a.json", data)
    storage.upload("blobs/b", file(data))
    for key in ("artifacts/model/a.json", "blobs/b"):
        assert storage.read(key) == data
        assert storage.download(key).read_bytes() == data


def test_create_writes_once_and_leaves_what_is_there(storage: Storage) -> None:
    assert storage.create("forest/000001.json", b"first")
    assert not storage.create("forest/000001.json", b"second")
    assert not storage.create("forest/000001.json", b"first")
    assert storage.read("forest/000001.json") == b"first"


def test_a_key_whose_object_was_deleted_can_be_created_again(storage: Storage) -> None:
    storage.create("a", b"first")
    storage.delete("a")
    assert storage.create("a", b"second")
    assert storage.read("a") == b"second"


@pytest.mark.races
def test_of_many_who_create_one_key_at_once_exactly_one_wins_and_its_bytes_stay(storage: Storage) -> None:
    together = threading.Barrier(16)

    def create(number: int) -> bool:
        together.wait()
        return storage.create("forest/000007.json", b"%d" % number * 10_000)

    for _ in range(30):
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(create, range(16)))
        assert won.count(True) == 1
        assert storage.read("forest/000007.json") == b"%d" % won.index(True) * 10_000
        assert keys(storage, "forest/") == ["forest/000007.json"]
        storage.delete("forest/000007.json")


def test_upload_replaces_what_is_there(storage: Storage, file: Callable[[bytes], Path]) -> None:
    storage.upload("blobs/a", file(b"damaged, and longer"))
    storage.upload("blobs/a", file(b"mended"))
    assert storage.read("blobs/a") == b"mended"
    assert storage.download("blobs/a").read_bytes() == b"mended"


@pytest.mark.races
def test_those_who_read_while_others_upload_see_whole_objects(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    versions = [bytes([number]) * 300_000 for number in range(4)]
    files = [file(version) for version in versions]
    storage.upload("blobs/a", files[0])
    done = threading.Event()

    def read() -> set[bytes]:
        seen = {storage.read("blobs/a")}
        while not done.is_set():
            seen.add(storage.read("blobs/a"))
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for path in files * 10:
                storage.upload("blobs/a", path)
        finally:
            done.set()
    for reader in readers:
        assert reader.result() <= set(versions)


def test_an_uploaded_file_and_its_object_do_not_change_with_each_other(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    path = file(b"as it was")
    storage.upload("blobs/a", path)
    path.write_bytes(b"changed afterwards")
    assert storage.read("blobs/a") == b"as it was"
    path.unlink()
    assert storage.download("blobs/a").read_bytes() == b"as it was"


def test_a_file_that_is_given_away_is_read_back_and_may_be_removed(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    path = file(b"as it was")
    for _ in range(2):  # the second time over itself
        storage.upload("blobs/a", path, keep=False)
    path.unlink()
    assert storage.read("blobs/a") == storage.download("blobs/a").read_bytes() == b"as it was"
    assert keys(storage, "") == ["blobs/a"]
    assert not list(storage.unfinished("blobs/"))


def test_listing_gives_the_objects_below_a_prefix_by_key_with_their_sizes(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    for key, size in (
        ("training/ab/000000010.json", 3),
        ("training/ab/000000009.json", 0),
        ("training/abc/1.json", 1),
    ):
        storage.create(key, b"x" * size)
    storage.upload("training/ab/blobs/f", file(b"12345"))
    assert [(entry.key, entry.size_bytes) for entry in storage.list("training/ab/")] == [
        ("training/ab/000000009.json", 0),
        ("training/ab/000000010.json", 3),
        ("training/ab/blobs/f", 5),
    ]
    assert keys(storage, "training/ab") == [
        "training/ab/000000009.json", "training/ab/000000010.json", "training/ab/blobs/f", "training/abc/1.json",
    ]  # fmt: skip
    assert keys(storage, "training/ab/0000000") == [
        "training/ab/000000009.json",
        "training/ab/000000010.json",
    ]
    assert keys(storage, "") == keys(storage, "training/")


def test_listing_where_nothing_is_gives_nothing(storage: Storage) -> None:
    assert keys(storage, "artifacts/model/") == []
    assert keys(storage, "") == []


def test_a_thousand_objects_and_more_are_listed_completely(storage: Storage) -> None:
    expected = [f"artifacts/scores/{number:05d}.json" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: storage.create(key, b""), expected))
    assert keys(storage, "artifacts/scores/") == expected


def test_objects_can_be_deleted_while_they_are_listed(storage: Storage) -> None:
    for number in range(5):
        storage.create(f"training/a/{number}.json", b"x")
    for entry in storage.list("training/a/"):
        storage.delete(entry.key)
    assert keys(storage, "training/a/") == []


def test_deleting_removes_one_object_and_may_be_done_again(storage: Storage) -> None:
    storage.create("training/a/1.json", b"x")
    storage.create("training/a/2.json", b"y")
    storage.delete("training/a/1.json")
    storage.delete("training/a/1.json")
    storage.delete("never/was/there")
    assert keys(storage, "") == ["training/a/2.json"]


def test_erasing_removes_what_lies_below_a_prefix_and_nothing_beside_it(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    for key in (
        "inbox/law/a.txt",
        "inbox/law/deep/b.txt",
        "inbox/law-2/a.txt",
        "inbox/lawyers",
        "blobs/0123",
    ):
        storage.upload(key, file(b"text"))
    storage.erase("inbox/law/")
    assert keys(storage, "") == ["blobs/0123", "inbox/law-2/a.txt", "inbox/lawyers"]
    storage.erase("blobs/0123")
    storage.erase("inbox/law/")
    storage.erase("never/was/there")
    assert keys(storage, "") == ["inbox/law-2/a.txt", "inbox/lawyers"]


def test_erasing_an_object_leaves_those_whose_keys_begin_with_its_own(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    for key in ("blobs/0123", "blobs/01234", "blobs/0123-4"):
        storage.upload(key, file(b"text"))
    storage.erase_object("blobs/0123")
    storage.erase_object("blobs/0123")
    assert keys(storage, "") == ["blobs/0123-4", "blobs/01234"]


@pytest.mark.parametrize("prefix", ["", "/", "../outside/"])
def test_a_whole_store_and_what_is_outside_of_it_cannot_be_erased(storage: Storage, prefix: str) -> None:
    storage.create("blobs/0123", b"x")
    with pytest.raises(StoreError):
        storage.erase(prefix)
    assert keys(storage, "") == ["blobs/0123"]


def test_erasing_removes_every_version_that_a_bucket_keeps_and_this_nodes_copy(
    storage: Storage, file: Callable[[bytes], Path], tmp_path: Path
) -> None:
    if "://" not in storage.location:
        pytest.skip("a folder keeps no versions")
    bucket = storage.location.split("/")[2]
    client = boto3.client("s3")
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    name = "0123456789abcdef" * 4
    for data in (b"first", b"second"):
        storage.upload(f"blobs/{name}", file(data))
    storage.create("training/law/1.json", b"gone before, but for its version")
    storage.delete("training/law/1.json")
    storage.create("training/lawyers/1.json", b"another")
    assert storage.download(f"blobs/{name}").read_bytes() == b"second"
    storage.erase_object(f"blobs/{name}")
    storage.erase("training/law/")
    left = client.list_object_versions(Bucket=bucket)
    assert [v["Key"].rpartition("ours/")[2] for v in left.get("Versions", ())] == ["training/lawyers/1.json"]
    assert not left.get("DeleteMarkers")
    assert not list(tmp_path.glob("cache/files/*"))


def test_an_address_leads_to_the_object_without_this_port(storage: Storage) -> None:
    storage.create("inbox/law/a text.txt", b"words")
    address = storage.address("inbox/law/a text.txt")
    bucket, separator, key = address.removeprefix("s3://").partition("/")
    if separator and address.startswith("s3://"):
        assert boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read() == b"words"
    else:
        assert Path(address).read_bytes() == b"words"


def test_the_size_of_an_object_is_told_without_reading_it(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    storage.create("artifacts/model/a.json", b"12345")
    storage.upload("blobs/empty", file(b""))
    storage.upload("blobs/a", file(b"1"))
    storage.upload("blobs/a", file(b"longer"))
    assert [storage.size(key) for key in ("artifacts/model/a.json", "blobs/empty", "blobs/a")] == [5, 0, 6]


def test_a_prefix_or_a_folder_has_no_size(storage: Storage) -> None:
    storage.create("blobs/abcdef", b"x")
    for key in ("blobs/abc", "blobs"):
        with pytest.raises(StoreError):
            storage.size(key)


def test_what_is_whole_is_not_unfinished(storage: Storage, file: Callable[[bytes], Path]) -> None:
    storage.create("artifacts/model/a.json", b"x")
    storage.upload("blobs/a", file(b"x"))
    assert list(storage.unfinished("artifacts/")) == list(storage.unfinished("blobs/")) == []
    assert list(storage.unfinished("never/")) == []


@pytest.mark.parametrize("verb", ["read", "download", "size"])
def test_what_is_not_there_is_missing_and_the_error_names_it(storage: Storage, verb: str) -> None:
    storage.create("blobs/another", b"x")
    with pytest.raises(MissingError) as missing:
        getattr(storage, verb)("blobs/0123")
    assert "blobs/0123" in str(missing.value)
    storage.create("blobs/0123", b"x")
    storage.delete("blobs/0123")
    with pytest.raises(MissingError):
        getattr(storage, verb)("blobs/0123")


@pytest.mark.parametrize("key", ["/etc/passwd", "../outside", "blobs/../../outside", "blobs/\0"])
def test_a_key_cannot_lead_out_of_the_store(
    storage: Storage, file: Callable[[bytes], Path], key: str
) -> None:
    for use in (
        lambda: storage.create(key, b"x"),
        lambda: storage.upload(key, file(b"x")),
        lambda: storage.read(key),
        lambda: storage.download(key),
        lambda: storage.size(key),
        lambda: storage.delete(key),
    ):
        with pytest.raises(StoreError):
            use()


def test_a_store_is_opened_again_by_its_location(storage: Storage, file: Callable[[bytes], Path]) -> None:
    storage.create("artifacts/model/a.json", b"manifest")
    storage.upload("blobs/b", file(b"bytes"))
    again = open_storage(storage.location)
    assert type(again) is type(storage)
    assert again.location == storage.location
    assert again.read("artifacts/model/a.json") == b"manifest"
    assert not again.create("artifacts/model/a.json", b"other")
    assert keys(again, "") == ["artifacts/model/a.json", "blobs/b"]


def test_what_fails_to_upload_leaves_no_object(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        storage.upload("blobs/a", tmp_path / "no such file")
    assert keys(storage, "") == []


def begin_to_write(storage: Storage, key: str) -> None:
    """What a process that was killed meanwhile leaves behind: 5 MiB of a file."""
    if "://" in storage.location:
        bucket, _, prefix = storage.location.removeprefix("s3://").partition("/")
        name = {"Bucket": bucket, "Key": f"{prefix}/{key}"}
        upload = boto3.client("s3").create_multipart_upload(**name)["UploadId"]
        boto3.client("s3").upload_part(**name, UploadId=upload, PartNumber=1, Body=bytes(5 * 2**20))
        return
    path = Path(storage.location, key).parent / f".writing-{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(5 * 2**20))


def test_what_a_killed_process_was_writing_is_no_object_and_is_discarded(
    storage: Storage, file: Callable[[bytes], Path]
) -> None:
    storage.upload("blobs/ab", file(b"whole"))
    for key in ("blobs/ab", "blobs/ab", "training/law/blobs/c", "inbox/law/../d"):
        if ".." not in key or "://" in storage.location:
            begin_to_write(storage, key)
    assert keys(storage, "") == ["blobs/ab"]
    begun = [*storage.unfinished("blobs/"), *storage.unfinished("training/"), *storage.unfinished("inbox/")]
    assert [entry.size_bytes for entry in begun] == [5 * 2**20] * len(begun)
    assert len(begun) >= 3
    if "://" not in storage.location or "AWS_ENDPOINT_URL" in os.environ:  # moto's uploads all began in 2010
        assert all(abs(entry.modified - time.time()) < 600 for entry in begun)
    storage.discard(begun[0].key)
    storage.discard(begun[0].key)
    assert [*storage.unfinished("blobs/")] == begun[1:2]
    for entry in begun:
        storage.discard(entry.key)
    assert [
        *storage.unfinished("blobs/"),
        *storage.unfinished("training/"),
        *storage.unfinished("inbox/"),
    ] == []
    assert storage.read("blobs/ab") == b"whole"


def test_erasing_a_folder_discards_what_was_being_written_in_it_and_nothing_beside_it(
    storage: Storage,
) -> None:
    for key in ("training/law/blobs/a", "training/lawyers/blobs/a", "blobs/a"):
        begin_to_write(storage, key)
    storage.erase("training/law/")
    storage.erase("blobs/a")
    assert [entry.key.rpartition("/")[0] for entry in storage.unfinished("training/")] == [
        "training/lawyers/blobs"
    ]
    assert len([*storage.unfinished("blobs/")]) == 1


@pytest.fixture
def house(storage: Storage, tmp_path: Path) -> House:
    """A store whose forest lost the domain law just now."""
    (tmp_path / "files").mkdir()
    house = House(storage, tmp_path / "files")
    house.found()
    house.remove("law")
    return house


def unfinished(storage: Storage) -> list[Entry]:
    return [entry for folder in ("artifacts/", "blobs/", "training/") for entry in storage.unfinished(folder)]


def test_what_killed_processes_were_writing_is_collected_once_it_is_old(house: House) -> None:
    for key in ("blobs/ab", "training/law/blobs/c", "artifacts/model/d"):
        begin_to_write(house.storage, key)
    if "://" not in house.storage.location or "AWS_ENDPOINT_URL" in os.environ:
        assert find_garbage(house.ledger, 10, 3600).unfinished == ()
    garbage = find_garbage(house.ledger, 10, -3600)
    assert {*garbage.unfinished} == {entry.key for entry in unfinished(house.storage)}
    assert garbage.size_bytes >= 15 * 2**20
    collect(house.ledger, garbage)
    assert unfinished(house.storage) == []


@pytest.mark.races
def test_what_killed_processes_were_writing_goes_with_a_purge_whatever_its_age(house: House) -> None:
    """Nobody knows whose text it holds."""
    expert = house.refs["law expert"].identity
    for key in ("blobs/ab", f"training/{expert}/blobs/c", "training/another/blobs/c"):
        begin_to_write(house.storage, key)
    purge(house.ledger, plan_purge(house.ledger, "law"))
    assert [entry.key.rpartition("/")[0] for entry in unfinished(house.storage)] == ["training/another/blobs"]
    assert not house.is_there("law text")
    assert verify(house.ledger).problems == ()


@pytest.mark.races
def test_keys_that_somebody_else_wrote_with_dots_in_them_are_listed_and_erased_as_they_are(
    storage: Storage,
) -> None:
    """`inbox/x/../y` is a key like any other in a bucket.

    It kept a purge of x from ever coming to its end.
    """
    if "://" not in storage.location:
        pytest.skip("a folder can have no such name")
    bucket, _, prefix = storage.location.removeprefix("s3://").partition("/")
    odd = ["inbox/x/../y", "inbox/x/./a", "inbox/x//b", "inbox/x/..", "inbox/x/a/../../z"]
    for key in (*odd, "inbox/y", "inbox/z", "inbox/xy/../a"):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"text")
    assert keys(storage, "inbox/x/") == sorted(odd)
    ledger = Ledger(storage)
    purge(ledger, plan_purge(ledger, "x"))
    assert keys(storage, "inbox/") == ["inbox/xy/../a", "inbox/y", "inbox/z"]
    assert verify(ledger).problems == ()


# A local folder alone


def test_a_file_that_is_given_away_is_linked_where_the_link_is_as_a_new_file(tmp_path: Path) -> None:
    """A store's folder may give its files a group, by which a team reads them; a link would not have it."""
    storage = LocalFolder(str(tmp_path / "store"))
    for name, permissions in (("ordinary", 0o666), ("private", 0o600)):
        file = tmp_path / name
        os.close(os.open(file, os.O_CREAT, permissions))
        os.utime(file, (0, 0))
        storage.upload(f"blobs/{name}", file, keep=False)
        storage.upload("blobs/kept", file)
        assert storage.download(f"blobs/{name}").samefile(file) == (name == "ordinary")
        assert not storage.download("blobs/kept").samefile(file)
        stored = storage.download(f"blobs/{name}").stat()
        assert stored.st_mode & 0o044, "the team cannot read it"
        assert stored.st_mtime > 0, "a collection would take it for an old one"


@pytest.mark.parametrize("verb", ["create", "upload", "give away"])
def test_who_is_still_writing_what_somebody_discards_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    (tmp_path / "file").write_bytes(b"bytes")
    storage, flush, discarded = LocalFolder(str(tmp_path / "store")), os.fsync, []

    def discard_then_flush(descriptor: int) -> None:
        if not discarded:
            discarded.extend(storage.unfinished("blobs/"))
            storage.discard(discarded[0].key)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", discard_then_flush)
    if verb == "create":
        assert storage.create("blobs/a", b"bytes")
    else:
        storage.upload("blobs/a", tmp_path / "file", keep=verb == "upload")
    assert storage.read("blobs/a") == b"bytes"
    assert len(discarded) == 1
    assert list(storage.unfinished("blobs/")) == []


@pytest.mark.parametrize("leads", ["x", "a" * 300, "../elsewhere", "nowhere", "../../file/below"])
@pytest.mark.parametrize("place", ["inbox/x", "inbox/x/deep/link"])
def test_links_are_listed_and_removed_and_never_followed(tmp_path: Path, place: str, leads: str) -> None:
    """A loop below `inbox/x/` kept a purge, and an expansion, from ever looking at the inbox again."""
    storage = LocalFolder(str(tmp_path / "store"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/READY").write_bytes(b"somebody else's")
    (tmp_path / "store/elsewhere").mkdir(parents=True)
    (tmp_path / "store/elsewhere/READY").write_bytes(b"another's")
    storage.create("inbox/other/READY", b"")
    link = tmp_path / "store" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(leads)
    assert keys(storage, "inbox/") == sorted(["inbox/other/READY", place])
    storage.delete("inbox/x/READY")
    storage.erase("inbox/x/")
    storage.erase("inbox/x/")
    assert keys(storage, "inbox/") == ["inbox/other/READY"]
    assert not os.path.lexists(link)
    assert (tmp_path / "elsewhere/READY").exists()
    assert (tmp_path / "store/elsewhere/READY").exists()


def test_a_folder_of_the_stores_own_may_lie_on_another_disk(tmp_path: Path) -> None:
    storage = LocalFolder(str(tmp_path / "store"))
    (tmp_path / "other disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store/blobs").symlink_to(tmp_path / "other disk")
    storage.create("blobs/a", b"x")
    assert keys(storage, "blobs/") == ["blobs/a"]
    storage.delete("blobs/a")
    assert keys(storage, "blobs/") == []


def test_where_a_file_stands_instead_of_a_folder_nothing_is_below_it(tmp_path: Path) -> None:
    storage = LocalFolder(str(tmp_path))
    storage.create("inbox/x", b"a file")
    assert keys(storage, "inbox/x/") == []
    storage.delete("inbox/x/READY")
    storage.erase("inbox/x/")
    assert keys(storage, "") == ["inbox/x"]


def test_a_file_half_written_by_a_process_that_died_is_no_object(tmp_path: Path) -> None:
    storage = LocalFolder(str(tmp_path))
    storage.create("artifacts/model/a.json", b"whole")
    (left,) = tmp_path.glob("artifacts/model/*")
    left.with_name(".writing-0123").write_bytes(b"ha")
    assert keys(storage, "") == ["artifacts/model/a.json"]


def test_a_file_half_written_by_a_process_that_died_is_shown_as_unfinished_and_can_be_deleted(
    tmp_path: Path,
) -> None:
    storage = LocalFolder(str(tmp_path))
    storage.create("artifacts/model/a.json", b"whole")
    left = tmp_path / "artifacts/model" / f".writing-{'0123456789abcdef' * 2}"
    left.write_bytes(b"ha")
    left.with_name(".writing-my-notes").write_bytes(b"none of ours")
    (entry,) = storage.unfinished("artifacts/")
    assert (entry.key, entry.size_bytes) == (f"artifacts/model/{left.name}", 2)
    storage.delete(entry.key)
    assert not left.exists()
    assert list(storage.unfinished("artifacts/")) == []


@pytest.mark.parametrize("stands", ["folder", "pipe", "device"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path: Path, stands: str) -> None:
    storage = LocalFolder(str(tmp_path / "store"))
    storage.create("blobs/a", b"x")
    path = tmp_path / "store/blobs/b"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[
        stands
    ]()
    for use in (storage.read, storage.download, storage.size):
        with pytest.raises(StoreError, match="blobs/b") as refused:
            use("blobs/b")
        assert not isinstance(refused.value, MissingError)
        assert "move it" in refused.value.remedy
    assert storage.read("blobs/a") == b"x"


def test_links_that_lead_nowhere_or_in_a_circle_stop_no_listing(tmp_path: Path) -> None:
    storage = LocalFolder(str(tmp_path / "store"))
    storage.create("blobs/a", b"x")
    (tmp_path / "store/blobs/b").symlink_to("b")
    (tmp_path / "store/blobs/c").symlink_to("nowhere")
    (tmp_path / "store/blobs/d").symlink_to("a")
    assert keys(storage, "blobs/") == ["blobs/a", "blobs/b", "blobs/c", "blobs/d"]
    assert storage.read("blobs/d") == b"x"


def test_a_folder_that_cannot_be_written_is_a_store_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file where a folder should be")
    storage = LocalFolder(str(tmp_path))
    with pytest.raises(StoreError) as failed:
        storage.create("artifacts/model/a.json", b"x")
    assert not isinstance(failed.value, MissingError)
    assert str(tmp_path) in str(failed.value)
    assert failed.value.remedy
