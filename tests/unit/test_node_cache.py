"""The cache of a node: one fetch for all processes, a bound, and no trace
of what failed, died or was damaged."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from btm_cluster.errors import IntegrityError, MissingError, StoreError, UserError
from btm_cluster.ledger import Artifact, Ledger, blob_key
from btm_cluster.storage.node_cache import DEFAULT_GIGABYTES, IN_USE_SECONDS, NodeCache, node_cache
from tests.made import origin

DATA = b"0123456789" * 100


def name_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def writes(data: bytes) -> Callable[[Path], None]:
    """A fetch that succeeds."""
    return lambda path: path.write_bytes(data) and None


def not_to_be_called(path: Path) -> None:
    raise AssertionError(f"{path} was fetched though the file is there")


def kept(cache: NodeCache) -> set[str]:
    """Everything that lies in the cache, unfinished files included."""
    return {file.name for file in (cache.folder / "files").iterdir()}


def last_used(cache: NodeCache, name: str, seconds_ago: float) -> None:
    moment = time.time() - seconds_ago
    for folder in ("files", "used"):
        if (file := cache.folder / folder / name).exists():
            os.utime(file, (moment, moment))


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    """A cache for three files of DATA, and what eviction leaves free."""
    return NodeCache(tmp_path / "cache", int(3.4 * len(DATA)))


# Fetching


def test_a_file_is_fetched_once_and_then_taken_from_here(cache: NodeCache) -> None:
    path = cache.get(name_of("a"), writes(DATA))
    assert path.read_bytes() == DATA
    assert cache.get(name_of("a"), not_to_be_called) == path
    assert kept(cache) == {name_of("a")}


def test_a_file_is_fetched_anew_when_it_is_asked_for_anew(cache: NodeCache) -> None:
    cache.get(name_of("a"), writes(b"damaged"))
    assert cache.get(name_of("a"), writes(DATA), anew=True).read_bytes() == DATA
    assert cache.get(name_of("a"), not_to_be_called).read_bytes() == DATA


PROCESS = """
import os, sys
from pathlib import Path
from btm_cluster.storage.node_cache import NodeCache

folder, log, go, names = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]

def fetch(path):
    with open(log, "ab", buffering=0) as file:
        file.write(b"fetched\\n")  # one write of a file opened to append is atomic
    path.write_bytes(b"first half, ")
    with path.open("ab") as file:
        file.write(b"second half")

print("ready", flush=True)
sys.stdin.readline()
for name in names:
    assert NodeCache(folder, 10**6).get(name, fetch).read_bytes() == b"first half, second half"
"""


def test_many_processes_that_ask_for_the_same_files_fetch_each_once(tmp_path: Path) -> None:
    names, log = [name_of(str(number)) for number in range(20)], tmp_path / "log"
    arguments = [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(log), str(tmp_path / "go")]
    processes = [
        subprocess.Popen([*arguments, *names], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(6)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin
            process.stdin.write(b"go\n")
            process.stdin.flush()
        assert [process.wait() for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert log.read_bytes().count(b"fetched") == len(names)
    assert {file.name for file in (tmp_path / "cache" / "files").iterdir()} == set(names)


DYING_PROCESS = """
import sys, time
from pathlib import Path
from btm_cluster.storage.node_cache import NodeCache

def fetch(path):
    path.write_bytes(b"half a fi")
    print("fetching", flush=True)
    sys.stdin.read()

NodeCache(Path(sys.argv[1]), 10**6).get(sys.argv[2], fetch)
"""


def test_a_process_that_is_killed_while_it_fetches_neither_blocks_nor_feeds_the_next(
    cache: NodeCache,
) -> None:
    name = name_of("a")
    with subprocess.Popen(
        [sys.executable, "-c", DYING_PROCESS, str(cache.folder), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"fetching\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = kept(cache)
    assert cache.get(name, writes(DATA)).read_bytes() == DATA
    # What it left goes when there is no room, once nobody can be writing it any more.
    last_used(cache, left, 2 * 86_400)
    NodeCache(cache.folder, len(DATA)).get(name_of("b"), writes(DATA))
    assert kept(cache) == {name, name_of("b")}


@pytest.mark.parametrize(
    "failure", [MissingError("no such object"), KeyboardInterrupt(), ValueError("a bug")], ids=repr
)
def test_a_fetch_that_dies_half_way_leaves_nothing_and_the_next_one_succeeds(
    cache: NodeCache, failure: BaseException
) -> None:
    def die(path: Path) -> None:
        path.write_bytes(b"half a fi")
        raise failure

    with pytest.raises(type(failure)) as died:
        cache.get(name_of("a"), die)
    assert died.value is failure
    assert kept(cache) == set()
    assert cache.get(name_of("a"), writes(DATA)).read_bytes() == DATA


def test_a_damaged_file_stays_damaged_to_nobody_when_fetching_it_anew_fails(cache: NodeCache) -> None:
    def die(path: Path) -> None:  # noqa: ARG001
        raise StoreError("the store is out")

    cache.get(name_of("a"), writes(b"damaged"))
    with pytest.raises(StoreError):
        cache.get(name_of("a"), die, anew=True)
    assert cache.get(name_of("a"), writes(DATA)).read_bytes() == DATA


# The bound


def test_the_bound_holds_and_what_was_used_longest_ago_goes_first(cache: NodeCache) -> None:
    for number in range(3):
        cache.get(name_of(str(number)), writes(DATA))
        last_used(cache, name_of(str(number)), 2 * IN_USE_SECONDS + number)  # 2 longest ago
    cache.get(name_of("3"), writes(DATA))
    assert kept(cache) == {name_of("0"), name_of("1"), name_of("3")}
    last_used(cache, name_of("3"), 9 * IN_USE_SECONDS)
    cache.get(name_of("large"), writes(DATA * 2))
    assert kept(cache) == {name_of("0"), name_of("large")}


def test_using_a_file_saves_it_from_going_next(cache: NodeCache) -> None:
    for number in range(3):
        cache.get(name_of(str(number)), writes(DATA))
        last_used(cache, name_of(str(number)), 4 * IN_USE_SECONDS - number)  # 0 longest ago
    cache.get(name_of("0"), not_to_be_called)
    cache.get(name_of("3"), writes(DATA))
    assert kept(cache) == {name_of("0"), name_of("2"), name_of("3")}


def test_files_in_use_stay_though_the_bound_is_passed(cache: NodeCache) -> None:
    names = [name_of(str(number)) for number in range(6)]
    for name in names:
        cache.get(name, writes(DATA))
    assert kept(cache) == set(names)
    last_used(cache, names[4], 2 * IN_USE_SECONDS)
    cache.get(name_of("another"), writes(DATA))
    assert kept(cache) == {*names, name_of("another")} - {names[4]}


def test_a_file_larger_than_the_cache_is_given_all_the_same(cache: NodeCache) -> None:
    assert cache.get(name_of("a"), writes(DATA * 9)).read_bytes() == DATA * 9


def test_below_the_bound_the_folder_is_looked_through_once_a_day(
    cache: NodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr("os.scandir", lambda folder: looks.append(folder.name) or scandir(folder))
    roomy = NodeCache(cache.folder, 10**6)
    for number in range(9):
        roomy.get(name_of(str(number)), writes(DATA))
    assert looks.count("files") == 1
    stray = cache.folder / "files" / "fetching-stray"  # a killed process left it, uncounted
    stray.write_bytes(DATA)
    last_used(cache, stray.name, 2 * 86_400)
    tight = NodeCache(cache.folder, 10 * len(DATA))
    tight.get(name_of("9"), writes(DATA))
    assert stray.exists()
    tomorrow = time.time() + 90_000
    monkeypatch.setattr("time.time", lambda: tomorrow)
    tight.get(name_of("10"), writes(DATA))
    assert not stray.exists()


@pytest.mark.parametrize("count", [b"", b"123", b"a" * 34, b"%020d %012d\n!" % (0, 10**11)])
def test_a_count_that_a_killed_process_spoiled_is_counted_anew(cache: NodeCache, count: bytes) -> None:
    for number in range(3):
        cache.get(name_of(str(number)), writes(DATA))
        last_used(cache, name_of(str(number)), 2 * IN_USE_SECONDS + number)
    (cache.folder / "count").write_bytes(count)
    cache.get(name_of("3"), writes(DATA))
    assert kept(cache) == {name_of("0"), name_of("1"), name_of("3")}
    assert int((cache.folder / "count").read_bytes()[:20]) == 3 * len(DATA)


RACING_PROCESS = """
import sys
from pathlib import Path
from btm_cluster.storage import node_cache

node_cache.IN_USE_SECONDS = -1.0  # nothing is spared
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    name = f"{sys.argv[2]}-{number:062d}"
    node_cache.NodeCache(Path(sys.argv[1]), 20_000).get(name, lambda path: path.write_bytes(b"x" * 999) and None)
"""


@pytest.mark.races
def test_many_processes_that_fetch_and_evict_at_once_never_count_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [sys.executable, "-c", RACING_PROCESS, str(tmp_path / "cache")]
    processes = [
        subprocess.Popen([*arguments, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for i in range(4)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        process.communicate(b"go\n")
    assert [process.returncode for process in processes] == [0] * 4
    cache = NodeCache(tmp_path / "cache", 20_000)
    assert int((cache.folder / "count").read_bytes()[:20]) >= 999 * len(kept(cache))
    monkeypatch.setattr("btm_cluster.storage.node_cache.IN_USE_SECONDS", -1.0)
    cache.get(name_of("one more"), writes(DATA))
    assert 10 <= len(kept(cache)) <= 20


def test_a_file_that_is_open_can_be_read_to_its_end_after_it_had_to_go(cache: NodeCache) -> None:
    with cache.get(name_of("a"), writes(DATA)).open("rb") as file:
        last_used(cache, name_of("a"), 2 * IN_USE_SECONDS)
        NodeCache(cache.folder, 1).get(name_of("b"), writes(DATA))
        assert kept(cache) == {name_of("b")}
        assert file.read() == DATA


# A full disk, and folders that cannot be written


def full(times: int, code: int = errno.ENOSPC) -> Callable[[Path], None]:
    """A fetch that finds the disk full so many times."""
    left = iter(range(times))

    def fetch(path: Path) -> None:
        path.write_bytes(DATA[:10])
        if next(left, None) is not None:
            raise OSError(code, os.strerror(code))
        path.write_bytes(DATA)

    return fetch


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk full", "quota"])
def test_a_full_disk_is_emptied_of_what_nobody_uses_before_the_second_try(
    cache: NodeCache, code: int
) -> None:
    cache.get(name_of("old"), writes(DATA))
    cache.get(name_of("in use"), writes(DATA))
    last_used(cache, name_of("old"), 2 * IN_USE_SECONDS)
    assert cache.get(name_of("new"), full(1, code)).read_bytes() == DATA
    assert kept(cache) == {name_of("in use"), name_of("new")}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk full", "quota"])
def test_a_disk_that_stays_full_is_a_store_error_that_says_where_and_what_to_do(
    cache: NodeCache, code: int
) -> None:
    cache.get(name_of("in use"), writes(DATA))
    with pytest.raises(StoreError) as failed:
        cache.get(name_of("new"), full(2, code))
    assert str(cache.folder) in str(failed.value)
    assert os.strerror(code) in failed.value.found
    assert "disk space" in failed.value.remedy
    assert "BTM_CACHE_FOLDER" in failed.value.remedy
    assert kept(cache) == {name_of("in use")}


def test_a_real_disk_that_is_full_makes_room_while_it_can_and_then_says_so(small_disk: Path) -> None:
    cache = NodeCache(small_disk / "cache", 10**9)
    data = b"x" * 600_000
    cache.get(name_of("old"), writes(data))
    last_used(cache, name_of("old"), 2 * IN_USE_SECONDS)
    assert cache.get(name_of("new"), writes(data)).read_bytes() == data
    assert kept(cache) == {name_of("new")}
    with pytest.raises(StoreError) as failed:
        cache.get(name_of("too much"), writes(data))
    assert str(small_disk) in str(failed.value)
    assert "disk space" in failed.value.remedy
    assert kept(cache) == {name_of("new")}


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_cache_folder_that_is_a_file_or_below_one_is_a_store_error(tmp_path: Path, below: str) -> None:
    # Once a bare NotADirectoryError: the look for the file, before anything is fetched, was not translated.
    place = tmp_path / "a file"
    place.write_text("not a folder")
    with pytest.raises(StoreError) as failed:
        NodeCache(place / below, 10**6).get(name_of("a"), writes(DATA))
    assert str(place) in str(failed.value)
    assert "BTM_CACHE_FOLDER" in failed.value.remedy


def test_a_cache_folder_that_cannot_be_written_is_a_store_error(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if os.geteuid() == 0:  # whom no mode stops
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"no disk that is read only can be mounted here: {mounted.stderr.strip()}")
    folder.chmod(0o500) if os.geteuid() else None
    try:
        with pytest.raises(StoreError) as failed:
            NodeCache(folder, 10**6).get(name_of("a"), writes(DATA))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], check=True)
    assert str(folder) in str(failed.value)
    assert "BTM_CACHE_FOLDER" in failed.value.remedy


def test_a_file_of_a_disk_that_has_become_read_only_is_still_given_or_a_store_error(small_disk: Path) -> None:
    cache = NodeCache(small_disk / "cache", 10**6)
    cache.get(name_of("a"), writes(DATA))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreError) as failed:  # marking the file as used fails
        cache.get(name_of("a"), not_to_be_called)
    assert str(cache.folder) in str(failed.value)


# What the environment says


def test_a_node_says_where_its_cache_is_and_how_large(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path))
    monkeypatch.setenv("BTM_CACHE_GIGABYTES", "0.5")
    assert (node_cache().folder, node_cache().limit_bytes) == (tmp_path, 500_000_000)
    monkeypatch.delenv("BTM_CACHE_FOLDER")
    monkeypatch.setenv("BTM_CACHE_GIGABYTES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert node_cache().folder.parent == tmp_path
    assert node_cache().limit_bytes == DEFAULT_GIGABYTES * 1e9


@pytest.mark.parametrize("given", ["nonsense", "0", "-1", "nan", "inf", "50 GB"])
def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("BTM_CACHE_GIGABYTES", given)
    with pytest.raises(UserError) as refused:
        node_cache()
    assert "BTM_CACHE_GIGABYTES" in str(refused.value)
    assert given in refused.value.found


# Under a ledger


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended_bucket: str) -> Ledger:
    """The ledger of a store in pretended object storage."""
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "cache"))
    return Ledger.open(pretended_bucket)


@pytest.fixture
def artifact(ledger: Ledger, tmp_path: Path) -> Artifact:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return ledger.commit(origin("model", {}), {"weights": path}, {})


def test_a_file_that_is_opened_twice_is_the_same_file(ledger: Ledger, artifact: Artifact) -> None:
    path = ledger.open_file(artifact, "weights")
    assert path.read_bytes() == DATA
    assert path.name == artifact.blob("weights").sha256
    assert ledger.open_file(artifact, "weights") == path


@pytest.mark.parametrize(
    "damage", [b"", DATA[:-1], b"X" + DATA[1:], DATA + b"X"], ids=["empty", "cut", "flip", "longer"]
)
def test_a_damaged_file_in_the_cache_is_fetched_anew(
    ledger: Ledger, artifact: Artifact, damage: bytes
) -> None:
    path = ledger.open_file(artifact, "weights")
    path.write_bytes(damage)
    assert ledger.open_file(artifact, "weights").read_bytes() == DATA
    assert path.read_bytes() == DATA


def test_a_file_that_is_damaged_in_the_store_is_an_integrity_error(
    ledger: Ledger, artifact: Artifact, tmp_path: Path
) -> None:
    ledger.open_file(artifact, "weights").unlink()
    damaged = tmp_path / "damaged"
    damaged.write_bytes(DATA[:-1])
    key = blob_key(artifact.ref, artifact.blob("weights").sha256)
    ledger.storage.upload(key, damaged)
    with pytest.raises(IntegrityError) as failed:
        ledger.open_file(artifact, "weights")
    assert key in str(failed.value)


# On a machine that others use too

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")


def a_strangers(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o755)
    os.chown(folder, NOBODY, NOBODY)


def a_link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(elsewhere)


def open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


@pytest.mark.parametrize("below", ["", "files", "locks"])
@pytest.mark.parametrize("prepare", [pytest.param(a_strangers, marks=AS_ROOT), a_link, open_to_all])
def test_a_cache_that_another_user_may_have_prepared_is_refused_and_nothing_in_it_is_touched(
    tmp_path: Path, prepare: Callable[[Path], None], below: str
) -> None:
    """Below a shared /tmp its name can be guessed, and what lies there led
    to whatever file its owner liked."""
    cache = NodeCache(tmp_path / "cache", 10**6)
    if below:
        cache.folder.mkdir(mode=0o700)
    prepare(cache.folder / below)
    before = set(tmp_path.rglob("*"))
    for look in (lambda: cache.get(name_of("a"), not_to_be_called), cache.check, cache.folder_for_code):
        with pytest.raises(UserError, match="may have been prepared by another user") as refused:
            look()
        assert "BTM_CACHE_FOLDER" in refused.value.remedy
        assert str(cache.folder / below) in refused.value.what
    assert set(tmp_path.rglob("*")) == before


def test_what_the_cache_makes_is_its_users_alone(cache: NodeCache) -> None:
    umask = os.umask(0)
    try:
        cache.get(name_of("a"), writes(DATA))
        cache.folder_for_code()
    finally:
        os.umask(umask)
    folders = [cache.folder, *(path for path in cache.folder.iterdir() if path.is_dir())]
    assert len(folders) == 5
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {"0o700"}
    cache.check()


def test_a_count_that_is_a_link_to_a_file_of_anothers_leaves_that_file_alone(
    cache: NodeCache, tmp_path: Path
) -> None:
    """As root, the cache wrote its count to wherever the link led."""
    precious = tmp_path / "precious"
    precious.write_text("not to be lost")
    for make in (os.symlink, os.link):
        cache.folder.mkdir(mode=0o700, exist_ok=True)
        make(precious, cache.folder / "count")
        with pytest.raises(StoreError, match="cannot keep a file"):
            cache.get(name_of("a"), writes(DATA))
        (cache.folder / "count").unlink()
    assert precious.read_text() == "not to be lost"
    cache.get(name_of("a"), writes(DATA))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_in_a_files_place_is_replaced_or_named_and_hangs_nobody(
    cache: NodeCache, tmp_path: Path, kind: str
) -> None:
    cache.get(name_of("b"), writes(DATA))
    place = cache.folder / "files" / name_of("a")
    precious = tmp_path / "precious"
    precious.write_text("not to be lost")
    if kind == "folder":
        place.mkdir()
        with pytest.raises(StoreError, match="cannot keep a file"):
            cache.get(name_of("a"), writes(DATA))
        return
    place.symlink_to(precious) if kind == "link" else os.mkfifo(place)
    assert cache.get(name_of("a"), writes(DATA)).read_bytes() == DATA
    assert not place.is_symlink()
    assert precious.read_text() == "not to be lost"


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_cache_whose_count_or_folder_is_of_another_kind_is_a_store_error(
    cache: NodeCache, tmp_path: Path, kind: str
) -> None:
    make = os.mkfifo if kind == "pipe" else os.mkdir
    cache.folder.mkdir(mode=0o700)
    make(cache.folder / "count")
    make(tmp_path / "cache of another kind", 0o600)
    with pytest.raises(StoreError, match="cannot keep a file"):
        cache.get(name_of("a"), writes(DATA))
    if kind == "pipe":
        with pytest.raises(StoreError, match="cannot keep a file"):
            NodeCache(tmp_path / "cache of another kind", 10**6).get(name_of("a"), writes(DATA))


def test_a_folder_that_the_user_names_may_be_a_link_or_a_volume_that_is_open_to_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_to_all(tmp_path / "volume")
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "link"))
    assert node_cache().get(name_of("a"), writes(DATA)).read_bytes() == DATA
    open_to_all(tmp_path / "volume" / "compiled")
    with pytest.raises(UserError, match="compiled may have been prepared"):
        node_cache().get(name_of("a"), writes(DATA))


@AS_ROOT
def test_a_folder_that_the_user_names_and_another_user_owns_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_strangers(tmp_path / "theirs")
    monkeypatch.setenv("BTM_CACHE_FOLDER", str(tmp_path / "theirs"))
    with pytest.raises(UserError, match="prepared by another user"):
        node_cache().check()
