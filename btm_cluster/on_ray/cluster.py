"""Joining a Ray cluster, or starting a local one, and whether an ask can ever be met.

Ray supervises, schedules and retries; what it leaves to its caller, a clear word on an ask that cannot be placed, is here.
"""

import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from btm_cluster.errors import ResourcesError, one_line
from btm_cluster.room import Ask, fits, no_room
from btm_cluster.stopping import stopped

NAMESPACE = "btm"
CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[None]:
    """Joins the cluster at `address` (`auto`: the one this machine belongs to), or starts a local one, and leaves it."""
    options = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "WARNING"}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            ray.init("local", include_dashboard=dashboard, **options)
        else:
            _check_answers(address)
            _join(address, options)
    except SystemExit as exc:  # of Ray's own handler of SIGTERM, which is in place from here on
        ray.shutdown()
        raise stopped() from exc
    finally:
        signal.signal(signal.SIGTERM, handler)
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


def has_room(ask: Ask, autoscaling: bool) -> bool:
    """Whether the cluster as it stands can hold the group; False if it cannot and an autoscaler may make room.

    Open-source Ray does not tell what its autoscaler could add, so the plan says whether there is one.

    Raises:
        ResourcesError: it cannot, and it will not grow.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if fits(nodes, ask.how):
        return True
    if autoscaling:
        return False
    more = "add nodes; if an autoscaler adds them, set `autoscaling: true` there"
    raise no_room(ask, "the cluster", nodes, more)
