"""Throughput of the object-storage adapter beside `aws s3 cp --recursive`: the
same server, the same files, up and down.

    python benchmarks/store_throughput.py s3://bucket/prefix full --aws /tmp/awscli-venv/bin/aws
    python benchmarks/store_throughput.py s3://bucket/prefix toy        a few MB, to show that it works

Endpoint and credentials come from the environment; the bucket must exist, and below the prefix everything is
deleted. Each transfer is a process of its own, timed from start to exit: imports count on both sides. Its
memory is its peak RSS. Best time and highest memory of the repetitions; a ratio above 1 means that ours took
longer.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from btm_cluster.storage import open_storage

SIZES = {  # objects, MiB each
    "toy": {"few": (4, 24), "many": (40, 1)},
    "full": {"few": (8, 256), "many": (2000, 1)},
}
HOW_TO_GET_AWS = """get it into a venv of its own, for it pins what boto3 needs:
    python -m venv /tmp/awscli-venv && /tmp/awscli-venv/bin/pip install awscli
and give --aws /tmp/awscli-venv/bin/aws"""


@dataclass(frozen=True)
class Transfer:
    """Seconds and peak memory of one process."""

    seconds: float
    peak_mebibytes: float


def main() -> None:
    """Runs each contender in a process of its own, in turn, and prints a
    line for each direction and shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="s3://bucket/prefix")
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
    arguments = parser.parse_args()
    if arguments.ours:
        {"up": upload, "down": download}[arguments.ours](
            arguments.store, arguments.folder, arguments.files_at_once
        )
        return
    if not shutil.which(arguments.aws):
        parser.error(f"there is no {arguments.aws} here; {HOW_TO_GET_AWS}")
    for shape in [arguments.only] if arguments.only else SIZES[arguments.size]:
        compare(shape, *SIZES[arguments.size][shape], arguments)


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


def compare(shape: str, count: int, mebibytes: int, arguments: argparse.Namespace) -> None:
    """Both contenders on one set of files, in turn, so that a change of the machine's load meets both."""
    taken: dict[tuple[str, str], list[Transfer]] = {}
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
    print(f"{shape}: {count} x {mebibytes} MiB")
    for direction in ("up", "down"):
        best = {
            who: min(taken[direction, who], key=lambda transfer: transfer.seconds) for who in ("aws", "ours")
        }
        for who, transfer in best.items():
            rate = count * mebibytes * 2**20 / 1e6 / transfer.seconds
            peak = max(transfer.peak_mebibytes for transfer in taken[direction, who])
            print(
                f"  {direction:<5}{who:<5}{transfer.seconds:8.2f} s {rate:8.0f} MB/s {peak:6.0f} MiB", end=""
            )
            print(
                "" if who == "aws" else f"   ours/aws {transfer.seconds / best['aws'].seconds:.2f}",
                flush=True,
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


def measure(command: list[str]) -> Transfer:
    """Runs it to its end."""
    started = time.monotonic()
    process = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)  # this one child's usage, where getrusage has the largest of all
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(f"failed with {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return Transfer(seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


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
