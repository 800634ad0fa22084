"""The served forest as a Ray Serve deployment: replicas, each with an engine of its own.

`forest_app` is what a Serve configuration names (deploy/kuberay/rayservice.yaml).
"""

import asyncio
import base64
import contextlib
import logging
import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from btm_cluster.errors import ClosedError, ResourcesError, UserError, one_line
from btm_cluster.ledger import Ledger
from btm_cluster.serving.app import build_app
from btm_cluster.serving.forest import LiveForest
from btm_cluster.serving.http_errors import digest_of
from btm_cluster.serving.settings import API_KEY, ForestArguments, ServingSettings
from btm_cluster.steps.mixture import Mixture, mixture_of_store, newer_in_store

APPLICATION = "btm"


@serve.deployment
@serve.ingress()
class ForestServer:
    """A replica. It follows the newest version of its store, unless it is told what to serve."""

    def __init__(self, store: str, settings: dict[str, Any], follow_seconds: float) -> None:
        if settings["key_digest"] is None and os.environ.get(API_KEY):
            settings["key_digest"] = digest_of(os.environ[API_KEY])
        self._live = LiveForest(Ledger.open(store), ServingSettings(**settings))
        self._follow_seconds = follow_seconds
        self._follows = False
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._live)

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serves what a command has mixed; or a version of the store by number; or the newest, and those after it."""
        version = config.get("forest_version")
        self._follows = "mixture" not in config and version is None
        mixture = (
            mixture_of(config)
            if "mixture" in config
            else await asyncio.to_thread(mixture_of_store, self._live.ledger, version)
        )
        await self._live.change_to(mixture)
        if self._follows and self._following is None:
            self._following = asyncio.create_task(self._live.follow(self._newer, self._follow_seconds))

    def _newer(self, served: int) -> Mixture | None:
        return newer_in_store(self._live.ledger, served) if self._follows else None

    async def check_health(self) -> None:
        """Ray starts a replica anew whose engine has failed."""
        if self._live.current.failure is not None:
            raise ClosedError("the engine has failed", found=str(self._live.current.failure))


def config_of(mixture: Mixture) -> dict[str, str]:
    """A mixture as the configuration of replicas, which Ray Serve takes and tells as JSON."""
    return {"mixture": base64.b64encode(pickle.dumps(mixture)).decode()}


def mixture_of(config: Mapping[str, Any]) -> Mixture:
    """The mixture that `config_of` wrote."""
    mixture: Mixture = pickle.loads(base64.b64decode(config["mixture"]))
    return mixture


def forest_app(arguments: ForestArguments) -> Application:
    """The application that serves a store's forest: what a Serve configuration names."""
    return _application(arguments, {"forest_version": arguments.forest_version})


def with_gpus(arguments: ForestArguments) -> ForestArguments:
    """The same with a number of GPUs for each replica: one where this cluster has any, unless it was given."""
    if arguments.gpus_per_replica is not None:
        return arguments
    return arguments.model_copy(update={"gpus_per_replica": float(ray.cluster_resources().get("GPU", 0) > 0)})


def _application(arguments: ForestArguments, config: dict[str, Any]) -> Application:
    arguments = with_gpus(arguments)
    settings = arguments.settings
    if not arguments.gpus_per_replica:  # Ray does not hide GPUs from an actor that asks for none
        settings = replace(settings, device="cpu")
    autoscaling = autoscaling_of(arguments)
    replicas = (
        {"num_replicas": arguments.replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    )
    deployment = ForestServer.options(  # type: ignore[attr-defined]
        name="forest",
        user_config=config,
        # More than an engine takes, so that it answers 429 by itself.
        max_ongoing_requests=2 * (settings.rows + settings.waiting),
        ray_actor_options={
            "num_gpus": arguments.gpus_per_replica,
            "num_cpus": arguments.cpus_per_replica,
        },
        graceful_shutdown_timeout_s=settings.timeout_seconds,
        **replicas,
    )
    bound: Application = deployment.bind(arguments.store, asdict(settings), arguments.follow_seconds)
    return bound


def autoscaling_of(arguments: ForestArguments) -> AutoscalingConfig | None:
    """The settings of Ray Serve's autoscaling, where it decides how many replicas there are.

    By default a replica should have as many requests as its engine writes at once. Serve's default, 2, is for
    replicas that answer them one after the other.

    Raises:
        UserError: it does not know one of them, or does not take its value.
    """
    given = arguments.autoscaling
    if given is None:
        return None
    known = AutoscalingConfig.model_fields.keys()
    if unknown := given.keys() - known:
        raise UserError(
            "Ray Serve's autoscaling has no such setting",
            found=", ".join(sorted(unknown)),
            expected=", ".join(sorted(name for name in known if not name.startswith("_"))),
        )
    try:
        return AutoscalingConfig(**{"target_ongoing_requests": arguments.settings.rows} | given)
    except ValidationError as exc:
        found = "; ".join(one["msg"].removeprefix("Value error, ") for one in exc.errors())
        raise UserError("Ray Serve refuses the settings of its autoscaling", found=found) from exc


def start(arguments: ForestArguments, mixture: Mixture | None, host: str, port: int) -> None:
    """Serves on the cluster that this process has joined; returns once replicas answer.

    Called again, replicas change to another mixture without ending a request.

    Raises:
        ResourcesError: replicas do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    try:
        application = (
            forest_app(arguments) if mixture is None else _application(arguments, config_of(mixture))
        )
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as exc:
        told = serve.status().applications[APPLICATION].deployments
        found = "; ".join(one.message for one in told.values() if one.message)
        raise ResourcesError(
            "the forest's replicas do not start", found=found[-2000:] or one_line(exc)
        ) from exc


def _controller() -> Any:
    """Serve's own actor on this cluster, where it runs."""
    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None


def check_address(host: str, port: int) -> None:
    """Refuses an address other than that of a Serve that runs on the cluster, which keeps its own.

    Raises:
        ResourcesError: naming both.
    """
    controller = _controller()
    if controller is None:
        return
    known = ray.get(controller.get_http_config.remote())
    if (known.host, known.port) != (host, port):
        raise ResourcesError(
            "Ray Serve runs on this cluster already, at another address",
            found=f"{known.host}, port {known.port}",
            expected=f"{host}, port {port}",
            remedy="name its address with --host and --port, or end it with `serve shutdown`",
        )


def stop() -> None:
    """Ends the application, once the requests under way are answered; and Serve, where it serves nothing else."""
    while APPLICATION in serve.status().applications:
        # It waits for a minute, which is shorter than a request may take.
        with contextlib.suppress(TimeoutError):
            serve.delete(APPLICATION)
    controller = _controller()
    if controller is None or serve.status().applications:
        return
    # serve.shutdown() waits in a call that Ray tells of as failed, since its actor ends meanwhile.
    ray.get(controller.graceful_shutdown.remote(False))
    while _controller() is not None:
        time.sleep(0.1)
