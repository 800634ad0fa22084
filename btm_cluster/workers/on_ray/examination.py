"""Checks of Ray for `btm doctor`: whether it answers, its version and token,
its nodes, and what a job would carry."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.job_submission import JobSubmissionClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from btm_cluster.driver.capacity import NEW_RESOURCES, Demand, describe_nodes, fits
from btm_cluster.errors import BtmError, ResourcesError, one_line
from btm_cluster.workers.checks import Check
from btm_cluster.workers.machine import Machine, inspect_machine
from btm_cluster.workers.on_ray.cluster import CONNECT_SECONDS, TOKEN_REMEDY, connected, ray_folder
from btm_cluster.workers.on_ray.submission import try_job
from btm_cluster.workers.shadowing import shadowing_modules

LOOK_SECONDS = 180.0
JOB_SECONDS = 90.0
"""For a job that does nothing: a head that was just started takes jobs only once its agent is up."""
MOST_FILES = 100_000
HEAD = "node:__internal_head__"
"""The resource by which a cluster's head is known."""


def examine_cluster(
    address: str, store: str | None, demands: Sequence[Demand], autoscaling: bool
) -> tuple[list[Check], list[Machine]]:
    """Joins the cluster, and leaves it: what it says, and the facts of each of its nodes."""
    if address.startswith(("http://", "https://")):
        return _examine_dashboard(address), []
    try:
        with connected(address, dashboard=False) as dashboard:
            checks = [
                Check("Ray", "ok", f"{ray.__version__} at {address}, {len(ray.nodes())} node(s)"),
                _token(),
            ]
            checks.append(_jobs_of_joined(dashboard))
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            checks += [_check_capacity(demand, nodes, autoscaling) for demand in demands]
            unseen, machines = _look_at_nodes(store)
            return checks + unseen, machines
    except ResourcesError as exc:
        return [_wrong_ray(exc)], []


def examine_local(demands: Sequence[Demand], machine: Machine) -> list[Check]:
    """Checks of a cluster that a run would start on this machine."""
    node = {"CPU": float(machine.usable_cpus), "GPU": float(machine.torch_gpus)}
    try:
        ray_folder()
        ours = Check(
            "Ray",
            "ok",
            f"{ray.__version__}; no --address or RAY_ADDRESS, so a run starts one on this machine",
        )
    except ResourcesError as exc:
        ours = _wrong_ray(exc)
    return [ours, *(_check_capacity(demand, [node], autoscaling=False) for demand in demands)]


def examine_working_directory(folder: Path) -> Check:
    """The size of a folder that `ray job submit --working-dir` would carry, against Ray's limit."""
    limit = packaging.GCS_STORAGE_MAX_SIZE
    sizes: list[int] = []
    carried: set[Path] = set()

    def add(path: Path) -> None:
        if path.is_file():
            sizes.append(path.stat().st_size)
        if path.parent == folder:
            carried.add(path)
        if sum(sizes) > limit or len(sizes) > MOST_FILES:
            raise OverflowError

    quiet = logging.getLogger("btm_cluster.unsaid")
    quiet.disabled = True
    excluded = packaging._get_excludes(folder, get_runtime_env_default_excludes())
    try:
        packaging._dir_travel(folder, [excluded], add, include_gitignore=True, logger=quiet)
    except OverflowError:
        found = f"{folder}: more than {limit / 2**20:.0f} MiB or {MOST_FILES:,} files, Ray's limit"
        return Check(
            "working directory", "wrong", found, "leave out what a job does not need in a .rayignore"
        )
    if hiding := [path.name for path in shadowing_modules(folder) if path in carried]:
        found = f"{', '.join(hiding)} would hide the libraries of these names in a job that carries it"
        remedy = "rename them before `ray job submit --working-dir`, or name them in a .rayignore"
        return Check("working directory", "note", found, remedy)
    return Check(
        "working directory",
        "ok",
        f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files of {limit / 2**20:.0f} MiB",
    )


def _examine_dashboard(address: str) -> list[Check]:
    def query() -> None:
        client = JobSubmissionClient(address)
        client.list_jobs()
        client.get_version()

    try:
        _within(LOOK_SECONDS, query)
    except ray.exceptions.AuthenticationError as exc:
        return [Check("token", "wrong", one_line(exc, 160), TOKEN_REMEDY)]
    except Exception as exc:  # of whatever kind Ray has for it; a service that is none answers in odd ways
        found = one_line(exc, 200)
        return [Check("Ray", "wrong", f"{address}: {found}", "check the address, and that the head runs")]
    inside = (
        "nodes are seen from inside alone: ray job submit --working-dir . -- btm doctor PLAN --address auto"
    )
    answers = Check("Ray", "ok", f"its dashboard answers at {address}")
    return [answers, _jobs(address), Check("nodes", "note", "not looked at", inside)]


def _jobs(dashboard: str) -> Check:
    """Whether the cluster takes a job: its dashboard may answer, and the agent that starts jobs be dead."""
    try:
        _within(LOOK_SECONDS, lambda: try_job(dashboard, JOB_SECONDS))
    except Exception as exc:  # as above
        found = f"{exc.what}: {exc.found}" if isinstance(exc, BtmError) else one_line(exc)
        remedy = "see dashboard_agent.log on the head; each Ray on one machine needs its own --dashboard-agent-listen-port"
        return Check("jobs", "wrong", found[:300], remedy)
    return Check("jobs", "ok", "one that does nothing was taken and ended well")


def _jobs_of_joined(dashboard: str) -> Check:
    """The same, where the dashboard is reached from here: it often listens on the head's loopback alone."""
    host, _, port = dashboard.rpartition(":")
    heads = [node["NodeManagerAddress"] for node in ray.nodes() if HEAD in node["Resources"]]
    try:
        if host in ("127.0.0.1", "localhost") and ray.util.get_node_ip_address() not in heads:
            raise ConnectionError("that is the head's loopback")
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as exc:
        why = (
            f"its dashboard at {dashboard} is not reached from here: {exc}"
            if dashboard
            else "it has no dashboard"
        )
        remedy = "on the head, or with --address of a dashboard that is reached, a job is submitted"
        return Check("jobs", "note", f"not looked at: {why}", remedy)
    return _jobs(f"http://{dashboard}")


def _within(seconds: float, act: Callable[[], None]) -> None:
    """Raises what it raises, or a TimeoutError: the client of a dashboard waits for an answer without end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]


def _wrong_ray(exc: ResourcesError) -> Check:
    return Check("Ray", "wrong", f"{exc.what}{': ' if exc.found else ''}{exc.found}", exc.remedy)


def _token() -> Check:
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if is_token_auth_enabled():
        return Check("token", "ok", "token authentication is on, and ours is taken")
    found = "token authentication is off: whoever reaches the cluster's ports runs code on it"
    return Check("token", "note", found, "start every node with RAY_AUTH_MODE=token")


def _check_capacity(demand: Demand, nodes: Sequence[dict[str, float]], autoscaling: bool) -> Check:
    name = f"capacity for {'' if demand.label.startswith('an ') else 'the '}{demand.label}"
    asked = ", ".join(filter(None, [demand.description, demand.origin]))
    if fits(nodes, demand.how):
        return Check(name, "ok", asked)
    found = f"{asked}: asked; nodes with {describe_nodes(nodes)}"
    if autoscaling:
        return Check(name, "note", found, "a run waits until the autoscaler has added nodes")
    less = "ask for less in the plan's `cluster`"
    if demand.saved_at is not None:
        less = f"go on with the plan's resources by {NEW_RESOURCES}"
    return Check(
        name, "wrong", found, f"{less}, add nodes, or set `autoscaling: true` in the plan's `cluster`"
    )


def _look_at_nodes(store: str | None) -> tuple[list[Check], list[Machine]]:
    """A line for each node where nothing of ours runs, and the facts of the others."""
    task: Any = ray.remote(num_cpus=0, max_retries=0)(inspect_machine)
    looks = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            claimed = (node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            look = task.options(scheduling_strategy=there, name="doctor").remote(store, *claimed)
            looks[look] = node["NodeManagerHostname"]
    unseen, machines = [], []
    ray.wait(list(looks), num_returns=len(looks), timeout=LOOK_SECONDS)
    for look, host in looks.items():
        try:
            machines.append(ray.get(look, timeout=0))
        except ray.exceptions.RayError as exc:
            unseen.append(unseen_node(host, exc))
    return unseen, machines


def unseen_node(host: str, exc: Exception) -> Check:
    """Where a task cannot run or cannot import what a run needs."""
    said = str(exc).strip().splitlines() or [""]
    remedy = "every node needs the packages of docker/Dockerfile in the same versions, and to answer"
    return Check(f"node {host}", "wrong", f"{type(exc).__name__}: {said[-1]}"[:300], remedy)
