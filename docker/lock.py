"""Writes requirements.lock and torch-cuda.lock, what the images install, with
SHA-256: `python3.11 docker/lock.py`.

Takes the project's dependencies and its extra `serve`, with the versions of constraints.txt, and asks pip,
which downloads hardly more than metadata: a minute. For Python 3.11 on Linux x86_64, as docker/Dockerfile has
it. torch is in the file for CUDA alone: its build for CPUs is on an index of its own.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
FOR_CUDA = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)==")
HEADING = "# Written by docker/lock.py from constraints.txt: wheels for Python 3.11 on Linux x86_64.\n"


def locked(requirements: list[str], constraints: Path) -> list[str]:
    """A line for each package that pip would install from PyPI, with the hash of its wheel."""
    # Neither a mirror's own builds nor its settings: the hashes are to be PyPI's.
    mirrors = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")
    environment = {name: value for name, value in os.environ.items() if name not in mirrors}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--ignore-installed",
            "--only-binary=:all:",
        ]
        command += ["--quiet", "--report", str(report), "--constraint", str(constraints), *requirements]
        subprocess.run(command, check=True, env=environment | {"PIP_CONFIG_FILE": os.devnull})
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = []
    for package in found:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={package['metadata']['version']} --hash=sha256:{sha256}\n")
    return sorted(lines)


def main() -> None:
    """Asks pip, and writes both files."""
    if (sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"):
        sys.exit("lock.py: run it with the images' own Python, 3.11 on Linux x86_64")
    pyproject = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    requirements = [
        *project["dependencies"],
        *project["optional-dependencies"]["serve"],
        *pyproject["build-system"]["requires"],
    ]
    lines = locked(requirements, HERE.parent / "constraints.txt")
    for name, is_for_cuda in (("requirements.lock", False), ("torch-cuda.lock", True)):
        chosen = [line for line in lines if bool(FOR_CUDA.match(line)) == is_for_cuda]
        (HERE / name).write_text(HEADING + "".join(chosen), encoding="utf-8")
        print(f"wrote {name}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
