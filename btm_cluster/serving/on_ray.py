"""The served forest as a Ray Serve deployment: replicas, each with an engine of its own.

`forest_app` is what a Serve configuration names (deploy/kuberay/rayservice.yaml).
"""

import asyncio
import os
import pickle
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from btm_cluster.errors import ClosedError, ResourcesError, one_line
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
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._live)

    async def reconfigure(self, config: bytes | dict[str, Any]) -> None:
        """Serves what a command has mixed, as bytes; or a version of the store by
        number, or the newest."""
        if isinstance(config, bytes):
            mixture: Mixture = pickle.loads(config)
            await self._live.change_to(mixture)
            return
        version = config.get("forest_version")
        await self._live.change_to(await asyncio.to_thread(mixture_of_store, self._live.ledger, version))
        if version is None and self._following is None:
            newer = partial(newer_in_store, self._live.ledger)
            self._following = asyncio.create_task(self._live.follow(newer, self._follow_seconds))

    async def check_health(self) -> None:
        """Ray starts a replica anew whose engine has failed."""
        if self._live.current.failure is not None:
            raise ClosedError("the engine has failed", found=str(self._live.current.failure))


def forest_app(arguments: ForestArguments) -> Application:
    """The application that serves a store's forest: what a Serve configuration names."""
    return _application(arguments, {"forest_version": arguments.forest_version})


def _application(arguments: ForestArguments, config: bytes | dict[str, Any]) -> Application:
    settings = arguments.settings
    replicas = (
        {"num_replicas": arguments.replicas}
        if arguments.autoscaling is None
        else {"autoscaling_config": arguments.autoscaling}
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
        graceful_shutdown_timeout_s=settings.seconds,
        **replicas,
    )
    bound: Application = deployment.bind(arguments.store, asdict(settings), arguments.follow_seconds)
    return bound


def start(arguments: ForestArguments, mixture: Mixture | None, host: str, port: int) -> None:
    """Serves on the cluster that this process has joined; returns once replicas answer.

    A cluster that serves already keeps its own address. Called again, replicas change to another mixture
    without ending a request.

    Raises:
        ResourcesError: replicas do not start.
    """
    serve.start(http_options={"host": host, "port": port})
    try:
        application = (
            forest_app(arguments) if mixture is None else _application(arguments, pickle.dumps(mixture))
        )
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as exc:
        told = serve.status().applications[APPLICATION].deployments
        found = "; ".join(one.message for one in told.values() if one.message)
        raise ResourcesError(
            "the forest's replicas do not start", found=found[-2000:] or one_line(exc)
        ) from exc


def stop() -> None:
    """Ends the application, and Serve with it, once the requests under way are answered."""
    serve.delete(APPLICATION)
    serve.shutdown()
