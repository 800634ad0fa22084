"""A real Ray cluster of one node with token authentication, started once, and
the forest it is held against."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from btm_cluster.algorithm import grow
from btm_cluster.forest import Forest
from btm_cluster.ledger import Ledger, Ref, artifact_key, blob_key
from btm_cluster.plan import ClusterPlan, Plan
from btm_cluster.requests import Resources
from btm_cluster.workers.on_ray.lazily import LazyRayWorkers
from tests.conftest import free_port, in_process, plan_fields
from tests.forked import ForkedProcess

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
BTM = "btm_cluster"
GROW = "tests.end_to_end.grow_only"
"""Modules to be run; a program of another kind is a command."""

SESSION = "BTM_TEST_SESSION"
"""The Unix session of everything that a cluster's head runs: other test
runs on this machine have clusters too."""

NO_LOG_MONITOR = "--include-log-monitor=false"
"""It copies logs to drivers, which ask for none."""


def trainers(*sessions: str | int) -> list[int]:
    """Process ids of the actors that train, on the nodes that run in these sessions."""
    among = ",".join(map(str, sessions))
    found = subprocess.run(
        ["pgrep", "-s", among, "-f", r"^ray::Trainer"], capture_output=True, text=True
    ).stdout
    return [int(pid) for pid in found.split()]


def only_trainer(session: str) -> int:
    """The process id of the one trainer, once there is one and no more: the
    last one's process may be about to go."""
    deadline = time.monotonic() + 60
    while len(found := trainers(session)) != 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found[0]


@contextmanager
def ray_head(folder: Path, *arguments: str, cpus: int = 2, **variables: str) -> Iterator[dict[str, str]]:
    """Starts a cluster's head; gives the variables with which `ray` and `btm`
    reach it, its SESSION_FOLDER and DASHBOARD."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-for-tests-0123456789abcdef",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    session = f"/tmp/{folder.name}-{os.getpid()}"
    command = [
        *(
            str(BIN / "ray"),
            "start",
            "--head",
            "--dashboard-port=0",
            f"--num-cpus={cpus}",
            "--disable-usage-stats",
        ),
        # Without a port of its own, the agent of a second cluster on this machine dies, and no job can be
        # submitted.
        f"--dashboard-agent-listen-port={free_port()}",
        *(NO_LOG_MONITOR, f"--temp-dir={session}", *arguments),
    ]
    # A session of its own: its process group is killed at the end, not with `ray stop`, which stops every Ray
    # on this machine.
    with (folder / "log").open("w") as log:
        started = subprocess.Popen(
            command, env=environment | variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        started.wait()
        said = (folder / "log").read_text()
        address = re.search(r"--address='([\d.:]+)'", said)
        assert address, said
        dashboard = re.search(r"RAY_API_SERVER_ADDRESS='([^']+)'", said)
        found = {"SESSION_FOLDER": session} | ({"DASHBOARD": dashboard.group(1)} if dashboard else {})
        yield environment | found | {"RAY_ADDRESS": address.group(1), SESSION: str(started.pid)}
    finally:
        os.killpg(started.pid, signal.SIGKILL)


@contextmanager
def ray_node(
    environment: dict[str, str], cpus: int, *arguments: str, inside: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Adds a node to a cluster, started by the command `inside`, and waits until it has joined.

    Killing its process group is losing the machine.
    """
    command = [
        *(
            *inside,
            str(BIN / "ray"),
            "start",
            f"--address={environment['RAY_ADDRESS']}",
            f"--num-cpus={cpus}",
        ),
        *(NO_LOG_MONITOR, "--block", *arguments),
    ]
    with tempfile.TemporaryFile() as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(
                lambda: os.pread(log.fileno(), 100_000, 0).decode(),
                lambda said: "Ray runtime started" in said or node.poll() is not None,
            )
            assert node.poll() is None, os.pread(log.fileno(), 100_000, 0).decode()
            yield node
        finally:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node with two CPUs, while tests of this package run:
    idle, it takes a tenth of a core."""
    # Ports are Ray's to choose, so that clusters of other test runs on this machine are left alone.
    often = {"RAY_metrics_report_interval_ms": "500"}
    with ray_head(tmp_path_factory.mktemp("ray"), "--port=0", **often) as environment:
        yield environment


def _wait_for(
    read: Callable[[], str], is_ready: Callable[[str], bool], seconds: float = 240, every: float = 0.1
) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        said = read()
        if is_ready(said):
            return said
        time.sleep(every)
    raise AssertionError(f"not ready after {seconds} s: {read()[-2000:]}")


@pytest.fixture(scope="session")
def long_fields(texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A plan whose trainings take a few seconds each, so that there is something to interrupt."""
    fields = plan_fields(texts, tmp_path_factory.mktemp("undisturbed"))
    fields["domains"] = fields["domains"][:2]
    fields["training"] |= {"updates": 1600}
    fields["cluster"] |= {"checkpoint_minutes": 0.005, "micro_batch_blocks": 4}
    return fields


@pytest.fixture(scope="session")
def undisturbed(long_fields: dict[str, Any]) -> Forest:
    """The forest of that plan, grown in this process without a disturbance."""
    plan = Plan.model_validate(long_fields)
    return grow(plan, in_process(plan)).forest


@pytest.fixture
def long_plan(long_fields: dict[str, Any], tmp_path: Path) -> Path:
    """That plan as a file, with a store of its own."""
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(long_fields | {"store": str(tmp_path / "store")}), encoding="utf-8")
    return path


def write_prepared(
    fields: dict[str, Any],
    undisturbed: Forest,
    folder: Path,
    has_seed: bool = True,
    experts: int = 2,
    **cluster: Any,
) -> Path:
    """The plan as a file, with a store that lacks the models of the first
    `experts`, and the seed unless it `has_seed`."""
    store = str(folder / "store")
    shutil.copytree(fields["store"], store)
    ledger = Ledger.open(store)
    for entry in list(ledger.storage.list("forest/"))[has_seed:]:
        ledger.storage.delete(entry.key)
    missing = [expert.identity for expert in undisturbed.experts[:experts]]
    for identity in missing + [undisturbed.foundation.seed] * (not has_seed):
        model = ledger.get(Ref("model", identity))
        ledger.storage.delete(artifact_key(model.ref))
        for blob in model.blobs:
            if blob.name.endswith(".safetensors"):
                ledger.storage.delete(blob_key(model.ref, blob.sha256))
    path = folder / "plan.yaml"
    changed = fields | {"store": store, "cluster": fields["cluster"] | cluster}
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


class Btm:
    """A `btm` process, or another program of this project, watched while it runs."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], log: Path, program: str | Sequence[str] = BTM
    ) -> None:
        self._log = log
        self.process: ForkedProcess | subprocess.Popen[bytes]
        with log.open("w") as file:
            if isinstance(program, str):
                self.process = ForkedProcess(program, arguments, environment, log, log)
            else:
                command = [*program, *arguments]
                self.process = subprocess.Popen(
                    command, env=environment, stdout=file, stderr=file, cwd=REPOSITORY
                )

    @property
    def said(self) -> str:
        """Everything printed so far."""
        return self._log.read_text()

    def wait_until_said(self, pattern: str, seconds: float = 240) -> None:
        """Returns once the output matches; fails if the process ends before."""
        _wait_for(
            lambda: self.said,
            lambda said: bool(re.search(pattern, said)) or self.process.poll() is not None,
            seconds,
        )
        assert re.search(pattern, self.said), self.said

    def exit_code(self) -> int:
        """Waits for the end; fails, and ends it, if it does not come."""
        try:
            return self.process.wait(timeout=500)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end; it said:\n{self.said}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Ends it where it still runs, so that a failed test leaves the cluster to the next: a server would
        leave its replicas if it were killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=60)
        self.process.kill()
        self.process.wait()


@contextmanager
def starting(
    environment: dict[str, str], folder: Path, program: str | Sequence[str]
) -> Iterator[Callable[..., Btm]]:
    """A way to start `program` any number of times; what still runs in the end is ended."""
    started: list[Btm] = []

    def start(*arguments: str | Path) -> Btm:
        started.append(Btm(list(map(str, arguments)), environment, folder / f"log-{len(started)}", program))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def btm(cluster: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Btm]]:
    """Starts `btm` on the cluster."""
    with starting(cluster, tmp_path, BTM) as start:
        yield start


@pytest.fixture
def grow_only(cluster: dict[str, str], tmp_path: Path) -> Iterator[Callable[[Path], Btm]]:
    """Starts the growing of a plan's forest on the cluster, without its evaluation."""
    with starting(cluster, tmp_path, GROW) as start:
        yield start


def experts_in(store: Path) -> dict[str, dict[str, Any]]:
    """What `btm forest show --json` says of each expert, by domain."""
    command = [str(BIN / "btm"), "forest", "show", "--store", str(store), "--json"]
    shown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {expert["domain"]: expert for expert in shown["experts"]}


def plain(forest: Forest) -> dict[str, dict[str, Any]]:
    """A forest's experts as JSON shows them."""
    return {expert.domain: json.loads(json.dumps(asdict(expert))) for expert in forest.experts}


@pytest.fixture
def connect(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., LazyRayWorkers]:
    """Workers on the cluster for a store, a watcher and a stop, with further settings of a plan's `cluster`."""
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    settings = {"stop_grace_seconds": 240, "autoscaling": True}  # a node that joins may be late
    expert = Resources(1, 0, 1, 4, "float32", False)
    return lambda ledger, watcher, stop, events=None, **more: LazyRayWorkers(
        ledger.storage.location,
        watcher,
        lambda _: None,
        stop,
        ClusterPlan.model_validate(settings | more),
        expert,
        cluster["RAY_ADDRESS"],
        False,
        events,
    )
