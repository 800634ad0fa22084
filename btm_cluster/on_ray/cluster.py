"""Joining a Ray cluster, or starting a local one, and whether an ask can ever be met.

Ray supervises, schedules and retries; what it leaves to its caller, a clear word on an ask that cannot be placed, is here.
"""

import math
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from btm_cluster.errors import ResourcesError, one_line
from btm_cluster.requests import Resources

NAMESPACE = "btm"
CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[None]:
    """Joins the cluster at `address` (`auto`: the one this machine belongs to), or starts a local one, and leaves it."""
    options = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "WARNING"}
    if address is None:
        ray.init("local", include_dashboard=dashboard, **options)
    else:
        _check_answers(address)
        _join(address, options)
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuses an address where nothing listens, for which ray.init would wait for minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or "/" in address or not port.isdigit():
        return  # `auto`, or the address of a Ray Client
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as exc:
        raise ResourcesError(
            f"no Ray cluster answers at {address}",
            found=str(exc),
            expected="the address that `ray start --head` printed",
            remedy="check --address or RAY_ADDRESS, and that the head runs",
        ) from exc


def _join(address: str, options: Mapping[str, Any]) -> None:
    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as exc:
        raise ResourcesError(
            f"the Ray cluster at {address} lets nobody in",
            found=one_line(exc),
            expected="the same versions of Ray and Python, and the cluster's token",
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token",
        ) from exc


def bundle(how: Resources) -> dict[str, float]:
    """What one worker of a group holds."""
    asked: dict[str, float] = {"CPU": float(how.cpus_per_worker)}
    if how.gpus_per_worker:
        asked["GPU"] = float(how.gpus_per_worker)
    return asked


def has_room(asker: str, how: Resources, autoscaling: bool) -> bool:
    """Whether the cluster as it stands can hold the group; False if it cannot and an autoscaler may make room.

    Open-source Ray does not tell what its autoscaler could add, so the plan says whether there is one.

    Raises:
        ResourcesError: it cannot, and it will not grow.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if fits(nodes, how):
        return True
    if autoscaling:
        return False
    raise ResourcesError(
        f"the cluster has no room for {asker}, and never will",
        found=f"nodes with {nodes_words(nodes)}",
        expected=f"{group_words(how)}, a worker on one node",
        remedy="lower seed_gpus, seed_cpus, gpus_per_expert or cpus_per_expert in the plan's `cluster`, or add nodes; "
        "if an autoscaler adds them, set `autoscaling: true` there",
    )


def fits(nodes: Sequence[Mapping[str, float]], how: Resources) -> bool:
    """Whether nodes with these resources, empty, can hold the group."""
    return sum(_fitting(node, bundle(how)) for node in nodes) >= how.workers


def nodes_words(nodes: Sequence[Mapping[str, float]]) -> str:
    """What nodes have, in words."""
    return "; ".join(_words(node) for node in nodes) or "nothing"


def group_words(how: Resources) -> str:
    """What a group asks for, in words."""
    return f"{how.workers} worker(s) with {_words(bundle(how))} each"


def _fitting(node: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """How many bundles a node can hold."""
    return min(math.floor(node.get(name, 0) / amount + 1e-9) for name, amount in asked.items())


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
