"""Joining a Ray cluster, or starting a local one, and whether a demand can ever be met.

Ray supervises, schedules and retries; what it leaves to its caller, a clear word on a demand that cannot be
placed, is here.
"""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray._private import services
from ray.job_config import JobConfig

from btm_cluster.driver.capacity import Demand, fits, no_capacity
from btm_cluster.errors import BtmError, ResourcesError, one_line
from btm_cluster.stopping import stopped

NAMESPACE = "btm"
START_SECONDS = 300.0
"""In which Ray starts or is joined also on a machine with ten times as much to do as it has CPUs."""
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
_NO_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""The frame with which either side of HTTP/2 begins, its fourth byte the kind."""
LONGEST_SOCKET = 107
"""Bytes of a Unix socket's path."""
TOKEN_REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token to the cluster's token"
_SESSION = f"session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
"""Characters that Ray adds to its folder for the longest of its sockets."""
_ADDRESS = re.compile(r"(ray://)?(?P<host>\[[\da-fA-F:.]+\]|[\w.-]+):(?P<port>\d{1,5})")


@contextmanager
def connected(address: str | None, dashboard: bool) -> Iterator[str]:
    """Joins the cluster at `address` (`auto`: the one this machine belongs to),
    or starts a local one, and leaves it.

    Yields the host and port of its dashboard, nothing where it has none.

    Raises:
        ResourcesError: there is none, it lets nobody in, or none can be started.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _within(START_SECONDS):
            if address is None or address == "local":
                joined = _start(dashboard)
            else:
                _check_answers(address)
                joined = _join(address)
    except TimeoutError as exc:
        ray.shutdown()
        raise _too_slow(address) from exc
    except SystemExit as exc:  # of Ray's own handler of SIGTERM, which is in place from here on
        ray.shutdown()
        raise stopped() from exc
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield joined.dashboard_url or ""
    finally:
        ray.shutdown()


class _TooSlow(BaseException):
    """Passes by whoever takes an error of a single attempt for a reason to try again."""


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in here after so many seconds; in the main thread, which alone hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooSlow as exc:
        raise TimeoutError from exc
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_slow(address: str | None) -> ResourcesError:
    is_here = address is None or address == "local"
    what = (
        "Ray does not start on this machine" if is_here else f"the Ray cluster at {address} cannot be joined"
    )
    return ResourcesError(
        f"{what} within {START_SECONDS / 60:.0f} minutes",
        found=f"a load of {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs here",
        expected="some seconds",
        remedy="the same command again, once the machine has less to do; --in-process needs no Ray",
    )


def ray_folder() -> str:
    """Where a local cluster keeps its sockets and logs.

    Raises:
        ResourcesError: it cannot do so there.
    """
    above = os.path.abspath(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    folder = os.path.join(above, "ray")
    remedy = (
        "set RAY_TMPDIR to a short folder of this machine that can be written, such as /tmp; TMPDIR can stay"
    )
    too_long = len(os.fsencode(os.path.join(folder, _SESSION))) - LONGEST_SOCKET
    if too_long > 0:
        raise ResourcesError(
            "Ray cannot start on this machine: the path of its temporary folder is too long for a socket",
            found=f"{above}, from TMPDIR or RAY_TMPDIR, has {len(os.fsencode(above))} bytes",
            expected=f"at most {len(os.fsencode(above)) - too_long}",
            remedy=remedy,
        )
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ResourcesError(
            "Ray cannot start on this machine: its temporary folder cannot be written",
            found=f"{existing}, "
            f"{'whose permissions refuse it' if existing.is_dir() else 'which is no folder'}",
            expected="a folder, from RAY_TMPDIR or TMPDIR",
            remedy=remedy,
        )
    return folder


class _Job(JobConfig):
    """Workers import what the driver does.

    Ray would put the driver's current folder first on their path, where a module of the user's own may hide a
    library.
    """

    def __init__(self) -> None:
        ours = str(Path(__file__).parents[2])
        is_first = os.path.abspath(sys.path[0]) == ours  # as `python -m` in a checkout has it
        super().__init__(_py_driver_sys_path=[ours] if is_first else [])

    def _runtime_env_has_working_dir(self) -> bool:
        return True  # all that Ray asks this for is whether to add that folder


def _options() -> dict[str, Any]:
    return {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "WARNING"}


@contextmanager
def _process_groups_of_their_own() -> Iterator[None]:
    """Meanwhile, each process that Ray starts gets a process group of its own, as on Windows.

    `timeout`, `scancel` and supervisors signal a whole group. Ray's processes would end at once, and trainings
    could not save. They still die with this process.
    """
    popen = getattr(services, "ConsolePopen", None)
    if popen is None:  # a Ray that starts processes otherwise
        yield
        return
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _start(dashboard: bool) -> Any:
    folder = ray_folder()
    try:
        with _process_groups_of_their_own():
            return ray.init(
                "local", include_dashboard=dashboard, job_config=_Job(), _temp_dir=folder, **_options()
            )
    except BtmError:
        raise
    except Exception as exc:  # of whatever kind Ray has for it: bare ones are among them
        raise ResourcesError(
            "Ray does not start on this machine",
            found=f"{type(exc).__name__}: {one_line(exc)}",
            remedy=f"look into {folder}/session_latest/logs; `btm doctor` looks at disk, memory and folders; "
            "RAY_TMPDIR sets another folder, RAY_AUTH_TOKEN spares it writing one below HOME, --address or "
            "RAY_ADDRESS leads to a cluster that runs, --in-process needs none",
        ) from exc


def _check_answers(address: str) -> None:
    """Refuses what is no address, and one where nothing listens, for which
    ray.init would wait for minutes."""
    if address == "auto":
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        dashboard = "that of the dashboard is for `ray job submit`; " if "://" in address else ""
        raise ResourcesError(
            f"{address!r} is no address of a Ray cluster",
            expected="HOST:PORT as `ray start --head` printed it, or auto, for the cluster of this machine",
            remedy=f"{dashboard}set --address or RAY_ADDRESS, or unset it for a cluster that is started on "
            "this machine",
        )
    try:
        _greet(found["host"].strip("[]"), int(found["port"]))
    except (OSError, UnicodeError) as exc:
        raise ResourcesError(
            f"no Ray cluster answers at {address}",
            found=str(exc),
            expected="the address that `ray start --head` printed",
            remedy="check --address or RAY_ADDRESS, and that the head runs",
        ) from exc


def _greet(host: str, port: int) -> None:
    """Raises an OSError where nobody listens, or somebody who does not speak
    HTTP/2 as the head of a cluster does."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
            return
        connection.settimeout(ANSWER_SECONDS)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _NO_SETTINGS)
        answer = connection.recv(len(_NO_SETTINGS))
    if answer[3:4] != _NO_SETTINGS[3:4]:
        raise ConnectionError(f"something else listens there: it said {answer!r}")


def _join(address: str) -> Any:
    job = {} if "://" in address else {"job_config": _Job()}  # a Ray Client's job has no folder added
    try:
        return ray.init(address, **job, **_options())
    except BtmError:
        raise
    except ray.exceptions.AuthenticationError as exc:
        raise ResourcesError(
            f"the Ray cluster at {address} lets nobody in",
            found=one_line(exc),
            expected="the cluster's token",
            remedy=TOKEN_REMEDY,
        ) from exc
    except Exception as exc:  # of whatever kind Ray has for it
        raise ResourcesError(
            f"the Ray cluster at {address} cannot be joined",
            found=f"{type(exc).__name__}: {one_line(exc)}",
            expected="the address that `ray start --head` printed, the same versions of Ray and Python, and "
            "the cluster's token",
            remedy=f"check --address or RAY_ADDRESS, and that the head runs; {TOKEN_REMEDY}",
        ) from exc


def live_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_capacity(demand: Demand, autoscaling: bool) -> bool:
    """Whether the cluster as it stands can hold the group; False if it cannot
    and an autoscaler may make room.

    Open-source Ray does not tell what its autoscaler could add, so the plan says whether there is one.

    Raises:
        ResourcesError: it cannot, and it will not grow.
    """
    nodes = live_nodes()
    if fits(nodes, demand.how):
        return True
    if autoscaling:
        return False
    more = "add nodes; if an autoscaler adds them, set `autoscaling: true` there"
    raise no_capacity(demand, "the cluster", nodes, more)
