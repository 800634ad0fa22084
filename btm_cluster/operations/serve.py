"""`btm serve`: a forest behind OpenAI's completions API, on Ray Serve or in this process."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from types import FrameType

import uvicorn
from fastapi import FastAPI

from btm_cluster.driver.capacity import Demand
from btm_cluster.driver.driver import Driver
from btm_cluster.driver.port import Outcome
from btm_cluster.errors import BtmError, ClosedError, ResourcesError, UserError, one_line
from btm_cluster.ledger import Ledger
from btm_cluster.operations.ensemble import mixture_of_plan
from btm_cluster.plan import Plan
from btm_cluster.requests import Resources, StepRequest
from btm_cluster.serving.app import build_app
from btm_cluster.serving.forest import LiveForest
from btm_cluster.serving.settings import FOLLOW_SECONDS, ForestArguments
from btm_cluster.steps.mixture import Mixture, newer_in_store
from btm_cluster.stopping import break_off, handling
from btm_cluster.workers.in_process import InProcess, LocalControl
from btm_cluster.workers.on_ray.lazily import set_environment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """Where callers reach a server."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def url(self) -> str:
        """The base of all addresses."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


@dataclass(frozen=True)
class RayCluster:
    """The cluster to serve on: one that is joined, or without an address a local one."""

    address: str | None
    dashboard: bool = False


def check_serve_call(endpoint: Endpoint, new_server: bool) -> None:
    """Refuses a call that cannot be met, before anything starts.

    Raises:
        UserError: saying what is wrong with it.
    """
    if new_server:
        _check_free(endpoint)


def _check_free(endpoint: Endpoint) -> None:
    family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except (OSError, OverflowError) as exc:
            raise UserError(
                f"nothing can listen at {endpoint.url}",
                found=str(exc),
                expected="an address of this machine with a free port",
                remedy="name another with --host or --port",
            ) from exc


def mixture_to_serve(plan: Plan, driver: Driver, version: int | None) -> Mixture:
    """A version of the plan's forest, mixed for any text, and for each text that it was fitted for."""
    forest = driver.ledger.log.newest()
    standing = set(forest.domains) if forest is not None else set()
    texts = [text.name for text in plan.targets] + [
        domain.name for domain in plan.domains if domain.name in standing
    ]
    return mixture_of_plan(plan, driver, texts=texts, version=version)


class _OnlyFits(InProcess):
    """Fits what has been scored, and makes nothing that takes long."""

    def run(self, requests: Sequence[StepRequest]) -> Generator[tuple[StepRequest, Outcome], None, None]:
        for request in requests:
            if request.kind not in ("fit", "mixture"):
                raise ResourcesError(f"{request.label} has not been made", remedy="`btm evaluate` makes it")
        return super().run(requests)


def newer_of_plan(plan: Plan, served: int) -> Mixture | None:
    """The newest version, where it is not the one that is served and has been evaluated.

    Raises:
        BtmError: it has not been, or cannot be read.
    """
    ledger = Ledger.open(plan.store)
    versions = ledger.log.versions()
    if not versions or versions[-1] == served:
        return None
    workers = _OnlyFits(ledger, LocalControl(lambda _: None, threading.Event()))
    return mixture_to_serve(plan, Driver(ledger, workers), None)


def follower(plan: Plan | None, store: str) -> Callable[[int], Mixture | None]:
    """A function that finds a newer version: as the plan mixes it, or as a store alone does."""
    return partial(newer_in_store, Ledger.open(store)) if plan is None else partial(newer_of_plan, plan)


async def serve_in_process(
    live: LiveForest,
    mixture: Mixture,
    newer: Callable[[int], Mixture | None] | None,
    endpoint: Endpoint,
    ready: Callable[[], None],
) -> None:
    """Serves until a signal ends it; requests under way are answered first.

    With `newer`, newer versions of the forest take the place of the one that is served.

    Raises:
        ClosedError: the engine has failed: for whoever supervises this process to start it anew.
    """
    await live.change_to(mixture)
    server = _Server(build_app(live), endpoint, ready)
    beside = [asyncio.create_task(_end_with_its_engine(live, server))]
    if newer is not None:
        beside.append(asyncio.create_task(live.follow(newer, FOLLOW_SECONDS)))
    try:
        with handling(lambda *_: None):  # uvicorn has its own, and hands on what it took
            await server.serve()
    finally:
        for task in beside:
            task.cancel()
        live.close()
    if live.current.failure is not None:
        raise ClosedError("the engine has failed", found=one_line(live.current.failure))


async def _end_with_its_engine(live: LiveForest, server: uvicorn.Server) -> None:
    while live.current.failure is None:
        await asyncio.sleep(1)
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, which says when it listens."""

    def __init__(self, app: FastAPI, endpoint: Endpoint, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                endpoint.host,
                endpoint.port,
                log_level="warning",
                timeout_graceful_shutdown=30,
                lifespan="off",
                ws="none",
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def serve_on_ray(
    arguments: ForestArguments,
    mixture: Mixture | None,
    newer: Callable[[int], Mixture | None] | None,
    endpoint: Endpoint,
    cluster: RayCluster,
    ready: Callable[[], None],
) -> None:
    """Serves on a cluster until a signal ends it; requests under way are answered first.

    Replicas follow their store by themselves. A `mixture` they cannot follow: then `newer` is asked here.

    Raises:
        UserError: Ray Serve does not take the settings of its autoscaling.
        ResourcesError: no cluster, or one that cannot hold the replicas.
        Stopped: by a signal before it answered, or by a second one.
    """
    set_environment(cluster.address)
    from btm_cluster.serving import on_ray
    from btm_cluster.workers.on_ray.cluster import connected, has_capacity

    on_ray.autoscaling_of(arguments)  # refused before Ray starts
    ending = _Ending()
    with handling(ending.asked), connected(cluster.address, cluster.dashboard):
        arguments = on_ray.with_gpus(arguments)
        may_grow = arguments.autoscaling is not None and cluster.address is not None
        has_capacity(Demand("serving", _resources(arguments), remedy=_LESS), may_grow)
        on_ray.check_address(endpoint.host, endpoint.port)
        try:
            on_ray.start(arguments, mixture, endpoint.host, endpoint.port)
            ready()
            ending.answers_first = True
            while not ending.stop.wait(FOLLOW_SECONDS):
                if mixture is None or newer is None:
                    continue
                try:
                    if found := newer(mixture.version):
                        on_ray.start(arguments, found, endpoint.host, endpoint.port)
                        mixture = found
                except BtmError as exc:
                    log.warning("forest version %d stays: %s", mixture.version, exc)
        finally:
            on_ray.stop()


_LESS = (
    "lower --replicas, --gpus-per-replica or --cpus-per-replica, or add nodes; "
    "on a cluster whose autoscaler adds them, give --autoscaling"
)


class _Ending:
    """Handles signals: while a server answers, the first one lets it end; any other ends the command."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.answers_first = False

    def asked(self, number: int, frame: FrameType | None) -> None:
        if self.stop.is_set() or not self.answers_first:
            break_off(number, frame)
        self.stop.set()


def _resources(arguments: ForestArguments) -> Resources:
    scaling = arguments.autoscaling
    return Resources(
        workers=arguments.replicas if scaling is None else int(scaling.get("min_replicas", 1)),
        gpus_per_worker=arguments.gpus_per_replica or 0,
        cpus_per_worker=ceil(arguments.cpus_per_replica),
        micro_batch_blocks=1,
        precision=arguments.settings.precision,
        compile=False,
    )
