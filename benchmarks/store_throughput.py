"""Throughput of the object-storage adapter beside `aws s3 cp --recursive`: the
same server, the same files, up and down; and the small reads of a large expansion.

    python benchmarks/store_throughput.py own full              on a radosgw that is started for it
    python benchmarks/store_throughput.py s3://bucket/prefix full --aws /tmp/awscli-venv/bin/aws
    python benchmarks/store_throughput.py own toy               a few MB, to show that it works

Endpoint and credentials come from the environment; the bucket must exist, and below the prefix everything is
deleted. Each transfer is a process of its own, timed from start to exit: imports count on both sides. Its
memory is its peak RSS. Best time and highest memory of the repetitions.
"""

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from contenders import Usage, fastest, measure
from results import Result, best_of_rounds, finish, parse, this_machine, today

from btm_cluster.ledger.documents import THREADS, Documents, in_parallel
from btm_cluster.storage import open_storage

OWN = "own"
PORT = 21_480
SMALL_READS = {"toy": 100, "full": 2700}
SIZES = {  # objects, MiB each
    "toy": {"few": (4, 24), "many": (40, 1)},
    "full": {"few": (8, 256), "many": (2000, 1)},
}
HOW_TO_GET_AWS = """get it into a venv of its own, for it pins what boto3 needs:
    python -m venv /tmp/awscli-venv && /tmp/awscli-venv/bin/pip install awscli
and give --aws /tmp/awscli-venv/bin/aws"""


def main() -> None:
    """Runs each contender in a process of its own, in turn, and prints a
    line for each direction and shape."""
    asked = parse(_parser())
    if asked.ours:
        {"up": upload, "down": download}[asked.ours](asked.store, asked.folder, asked.files_at_once)
        return
    if not shutil.which(asked.aws):
        raise SystemExit(f"there is no {asked.aws} here; {HOW_TO_GET_AWS}")
    with ExitStack() as stack:
        if asked.store == OWN:
            asked.store, asked.after_deleting = stack.enter_context(own_server())
        results = []
        for shape in [asked.only] if asked.only else SIZES[asked.size]:
            results += compare(shape, *SIZES[asked.size][shape], asked)
        results.append(small_reads(asked.store, SMALL_READS[asked.size], asked.repeat))
        finish(results, asked)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help=f"s3://bucket/prefix, or {OWN}")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--only", choices=("few", "many"))
    parser.add_argument("--aws", default="aws", help="the executable to compare with")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--files-at-once", type=int, default=4, help="files that ours has under way")
    parser.add_argument(
        "--after-deleting", help="shell command for a server that frees space only when told to"
    )
    parser.add_argument("--ours", choices=("up", "down"), help=argparse.SUPPRESS)  # the process of our own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


@contextmanager
def own_server() -> Iterator[tuple[str, str]]:
    """A radosgw on loopback, as tests start it: a bucket in it, and the command by which it frees space."""
    start = Path(__file__).parents[1] / "tests" / "start-radosgw"
    with tempfile.TemporaryDirectory(prefix="radosgw-") as folder:
        subprocess.run([start, folder, str(PORT)], check=True, stdout=subprocess.DEVNULL)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
            "AWS_ACCESS_KEY_ID": "btmkey",
            "AWS_SECRET_ACCESS_KEY": "btmsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            boto3.client("s3").create_bucket(Bucket="throughput")
            collect = f"radosgw-admin -c {folder}/ceph.conf gc process --include-all"
            yield "s3://throughput/store", collect
        finally:
            for file in Path(folder, "run").glob("*.pid"):
                os.kill(int(file.read_text()), signal.SIGKILL)


def small_reads(store: str, count: int, repeat: int) -> Result:
    """An expansion's small reads: documents of 2 kB, as many at once as the ledger reads."""
    documents = Documents(open_storage(f"{store.rstrip('/')}/small"))
    keys = [f"artifacts/model/{number:064x}.json" for number in range(count)]
    in_parallel(lambda key: documents.create(key, {"facts": "x" * 1500}), keys)
    storage = open_storage(f"{store.rstrip('/')}/small")
    taken = []
    for _ in range(repeat):
        reader = Documents(storage)
        started, cpu = time.monotonic(), time.process_time()
        found = in_parallel(reader.read, keys)
        taken.append((time.monotonic() - started, time.process_time() - cpu))
        assert all(found), "a document is not there"
    seconds, cpu = min(taken)
    return Result(
        name="store-small-reads",
        what=f"{count:,} documents of 2 kB read and checked, on loopback, {THREADS} at once, best of {repeat}",
        machine=this_machine(),
        measured=today(),
        unit="s",
        better="lower",
        ours=seconds,
        theirs=None,
        peer=None,
        goal=3.0 * count / SMALL_READS["full"],
        limit=server_seconds([storage.address(key) for key in keys]),
        limit_is="the server's own time: requests signed beforehand, over as many bare sockets",
        beside={"CPU seconds of ours": f"{cpu:.1f}"},
    )


def server_seconds(addresses: list[str]) -> float | None:
    """Seconds in which the server answers a GET of each address; None where it is asked over TLS."""
    client = boto3.client("s3")
    requests, places = [], set()
    for address in addresses:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}))
        if url.scheme != "http":
            return None
        requests.append(f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
        places.add((url.hostname, url.port or 80))
    (place,) = places

    def ask(share: list[bytes]) -> None:
        with socket.create_connection(place) as connection, connection.makefile("rb") as answers:
            for request in share:
                connection.sendall(request)
                assert answers.readline().split()[1] == b"200"
                size = 0
                while (line := answers.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.partition(b":")[2])
                answers.read(size)

    started = time.monotonic()
    in_parallel(ask, [requests[first::THREADS] for first in range(THREADS)])
    return time.monotonic() - started


def upload(store: str, folder: Path, files_at_once: int) -> None:
    """Every file of the folder into the store, as the ledger does it."""
    storage = open_storage(store)
    with ThreadPoolExecutor(files_at_once) as pool:
        list(pool.map(lambda path: storage.upload(path.name, path), sorted(folder.iterdir())))


def download(store: str, folder: Path, files_at_once: int) -> None:
    """Every object of the store through the node's cache, which is in `folder`."""
    os.environ["BTM_CACHE_FOLDER"] = str(folder)
    storage = open_storage(store)
    with ThreadPoolExecutor(files_at_once) as pool:
        list(pool.map(storage.download, [entry.key for entry in storage.list("")]))


def compare(shape: str, count: int, mebibytes: int, arguments: argparse.Namespace) -> list[Result]:
    """Both contenders on one set of files, in turn, so that a change of the machine's load meets both. A row
    for each direction."""
    taken: dict[tuple[str, str], list[Usage]] = {}
    with tempfile.TemporaryDirectory(prefix="store-throughput-") as scratch:
        files = Path(scratch, "files")
        make_files(files, count, mebibytes)
        for _ in range(arguments.repeat):
            for who in ("aws", "ours"):
                target = Path(scratch, who)
                for direction, command in commands(who, files, target, arguments).items():
                    taken.setdefault((direction, who), []).append(measure(command))
                check_same_files(files, target / "files" if who == "ours" else target)
                shutil.rmtree(target)
                empty(arguments)
    aws = aws_version(arguments.aws)
    return [result_of(shape, direction, count, mebibytes, taken, aws) for direction in ("up", "down")]


def result_of(
    shape: str,
    direction: str,
    count: int,
    mebibytes: int,
    taken: dict[tuple[str, str], list[Usage]],
    aws: str,
) -> Result:
    """The row of one shape and direction."""
    best = {who: fastest(taken[direction, who]) for who in ("ours", "aws")}
    rates = {who: count * mebibytes * 2**20 / 1e6 / usage.seconds for who, usage in best.items()}
    return Result(
        name=f"store-{direction}" + ("" if shape == "few" else "-many"),
        what=f"{count:,} files of {mebibytes} MiB, loopback, {best_of_rounds(len(taken[direction, 'ours']))}",
        machine=this_machine(),
        measured=today(),
        unit="MB/s",
        better="higher",
        ours=rates["ours"],
        theirs=rates["aws"],
        peer=f"`aws s3 cp --recursive` {aws}",
        goal=1.0,
        limit=None,
        limit_is=None,
        beside={
            "CPU seconds": f"{best['ours'].cpu_seconds:.1f}, theirs {best['aws'].cpu_seconds:.1f}",
            "peak resident memory": f"{best['ours'].peak_bytes / 2**20:,.0f} MiB, theirs "
            f"{best['aws'].peak_bytes / 2**20:,.0f} MiB",
        },
    )


def commands(who: str, files: Path, target: Path, arguments: argparse.Namespace) -> dict[str, list[str]]:
    """The command for each direction, in order."""
    store = f"{arguments.store.rstrip('/')}/{who}"
    if who == "aws":
        copy = [arguments.aws, "s3", "cp", "--recursive", "--only-show-errors"]
        return {"up": [*copy, str(files), store], "down": [*copy, store, str(target)]}
    ours = [sys.executable, __file__, store, arguments.size, "--files-at-once", str(arguments.files_at_once)]
    return {
        "up": [*ours, "--ours", "up", "--folder", str(files)],
        "down": [*ours, "--ours", "down", "--folder", str(target)],
    }


def aws_version(aws: str) -> str:
    """As the program `aws` says it."""
    said = subprocess.run([aws, "--version"], check=True, capture_output=True, text=True).stdout
    return said.split()[0].partition("/")[2]


def make_files(folder: Path, count: int, mebibytes: int) -> None:
    """Random files, each named by its content's hash, as blobs are; written by
    the MiB, to keep this process small."""
    folder.mkdir()
    for _ in range(count):
        digest = hashlib.sha256()
        with open(folder / "next", "wb") as file:
            for _ in range(mebibytes):
                data = os.urandom(2**20)
                digest.update(data)
                file.write(data)
        (folder / "next").rename(folder / digest.hexdigest())


def check_same_files(expected: Path, found: Path) -> None:
    """Stops where a transfer was not whole."""
    sizes = [{file.name: file.stat().st_size for file in folder.iterdir()} for folder in (expected, found)]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"{found} has not the files of {expected}")


def empty(arguments: argparse.Namespace) -> None:
    """Deletes what the last contender stored, since a test server may hold no more than one set."""
    subprocess.run(
        [arguments.aws, "s3", "rm", "--recursive", "--only-show-errors", arguments.store], check=True
    )
    if arguments.after_deleting:
        subprocess.run(arguments.after_deleting, shell=True, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
