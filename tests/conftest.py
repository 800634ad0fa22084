"""What many tests share: small made-up texts, a tiny plan over them, and a driver in this process."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}

import pytest
import yaml
from hypothesis import settings

from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome, Workers
from btm_cluster.ledger import Ledger
from btm_cluster.plan import Plan
from btm_cluster.requests import StepRequest
from btm_cluster.workers.in_process import InProcess, LocalControl

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

DOMAINS = ("kitchen", "harbour", "orchard")
TARGETS = ("market",)


def made_up_documents(name: str, count: int, words_per_document: int = 60) -> list[str]:
    """Documents of a made-up language: half of the words are the domain's own, half are everybody's."""
    rng = random.Random(name)
    letters = "".join(sorted(set(name)))
    own = ["".join(rng.choices(letters, k=rng.randint(3, 7))) for _ in range(80)]
    common = ["".join(random.Random(i).choices("aeiourstln", k=4)) for i in range(80)]
    return [
        " ".join(rng.choice(rng.choice((own, common))) for _ in range(words_per_document))
        for _ in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    """Writes documents as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of documents for each of DOMAINS and TARGETS."""
    folder = tmp_path_factory.mktemp("texts")
    return {
        name: write_jsonl(folder / f"{name}.jsonl", made_up_documents(name, 200 if name in DOMAINS else 40))
        for name in (*DOMAINS, *TARGETS)
    }


def plan_fields(texts: dict[str, Path], store: Path) -> dict[str, Any]:
    """A plan that runs in seconds, as YAML would give it."""
    return {
        "name": "tiny",
        "store": str(store),
        "domains": [{"name": name, "text": str(texts[name])} for name in DOMAINS],
        "targets": [{"name": name, "text": str(texts[name])} for name in TARGETS],
        "reading": {"development_share": 0.1, "test_share": 0.1},
        "tokenizer": {"train": {"vocabulary": 320}},
        "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}},
        "training": {
            "block_tokens": 32,
            "updates": 12,
            "seed_share": 0.5,
            "blocks_per_domain_update": 4,
            "learning_rate": 3e-3,
        },
        "cluster": {"seed_cpus": 1, "cpus_per_expert": 1, "micro_batch_blocks": 16},
    }


TOGETHER = {
    "tests/contracts/": "the S3 server",
    "tests/faults/test_store_faults.py": "the S3 server",
    "tests/end_to_end/test_autoscaling.py": "clusters of their own",
    "tests/end_to_end/test_partition.py": "clusters of their own",
    "tests/end_to_end/test_survival.py::test_when_a_machine_is_lost": "clusters of their own",
    "tests/end_to_end/test_doctor.py": "the cluster",
    "tests/end_to_end/test_on_ray.py": "the cluster",
    "tests/end_to_end/test_searching.py": "the cluster",
    "tests/end_to_end/test_submission.py": "the cluster",
    "tests/end_to_end/test_watching.py": "the cluster",
    "tests/end_to_end/test_schedule.py": "another cluster",
    "tests/end_to_end/test_serving.py": "another cluster",
    "tests/end_to_end/test_survival.py": "another cluster",
    "tests/end_to_end/test_worker_group.py": "another cluster",
}
TOGETHER |= {
    f"tests/integration/test_{name}.py": "the grown forest"
    for name in (
        "averaging",
        "blocks",
        "cluster_ensemble",
        "contributions",
        "growing",
        "milestones",
        "mixture",
        "scoring",
        "serving",
        "soup",
    )
}
"""What goes to one process where several share the tests, since it shares
something dear; the rest goes by file."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist, whose own marks for groups have no effect with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next(
                (name for start, name in TOGETHER.items() if nodeid.startswith(start)), nodeid.split("::")[0]
            )

    return Together(config, log)


@contextmanager
def start_object_store(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server on loopback: the environment variables that lead boto3 to it."""
    try:
        port = _start_on_a_free_port(folder)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "btmkey",
            "AWS_SECRET_ACCESS_KEY": "btmsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        for file in (folder / "run").glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One for all tests."""
    if any(shutil.which(name) is None for name in ("radosgw", "ceph-mon", "ceph-osd")):
        pytest.skip("radosgw is not installed: see tests/start-radosgw")
    with start_object_store(tmp_path_factory.mktemp("radosgw")) as variables:
        yield variables


def _start_on_a_free_port(folder: Path) -> int:
    """Again with others where a port was taken between the look and its use."""
    for attempt in range(3):
        port = next(
            port for port in iter(_object_store_port, None) if _are_free(port, port + 5820, port + 9309)
        )
        command = [Path(__file__).parent / "start-radosgw", folder, str(port)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return port
        print(f"start-radosgw on port {port}, attempt {attempt + 1}:\n{done.stderr}")
    raise AssertionError("radosgw did not start")


def _object_store_port() -> int:
    """All three between the ports that Ray gives its workers and those that outgoing connections get."""
    return 20_000 + free_port() % 3_400


def _are_free(*ports: int) -> bool:
    """Whether nobody listens at any of them: `start-radosgw` takes three."""
    for port in ports:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return False
    return True


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def fields(texts: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """The fields of a tiny plan, to be changed by a test."""
    return plan_fields(texts, tmp_path / "store")


@pytest.fixture
def plan(fields: dict[str, Any]) -> Plan:
    """A tiny plan."""
    return Plan.model_validate(fields)


@pytest.fixture
def write_plan(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes fields as a plan file."""

    def write(fields: dict[str, Any]) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return path

    return write


def in_process(plan: Plan) -> Driver:
    """A driver without Ray."""
    ledger = Ledger.open(plan.store)
    return Driver(ledger, InProcess(ledger, LocalControl(lambda _: None, threading.Event())))


def run_all(workers: Workers, requests: Sequence[StepRequest]) -> list[Outcome]:
    """An outcome for each request, in order, without asking the ledger first."""
    outcomes = {request.ref: outcome for request, outcome in workers.run(requests)}
    return [outcomes[request.ref] for request in requests]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
