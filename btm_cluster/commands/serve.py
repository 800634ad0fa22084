"""`btm serve` on the command line: what is served, where, by how many replicas; until a signal ends it."""

import asyncio
import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from btm_cluster.errors import UserError
from btm_cluster.plan import Plan
from btm_cluster.session import driving, open_ledger, opened_view
from btm_cluster.terminal.options import Address, Dashboard, ForestPlan, InProcess, Store, forest_place
from btm_cluster.workers.shadowing import check_shadowing

if TYPE_CHECKING:
    from btm_cluster.operations.serve import Endpoint
    from btm_cluster.serving.settings import ServingSettings
    from btm_cluster.steps.mixture import Mixture
    from btm_cluster.terminal.progress import ProgressView


def serve(
    plan_path: ForestPlan = None,
    store: Store = None,
    forest_version: Annotated[
        int | None,
        typer.Option(
            help="Serve this version; without it, the newest, also as newer ones appear.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the forest.")] = 1,
    gpus_per_replica: Annotated[
        float | None,
        typer.Option(min=0, help="1 where the cluster has GPUs; 0 for CPUs.", show_default=False),
    ] = None,
    cpus_per_replica: Annotated[float, typer.Option(min=0)] = 1,
    autoscaling: Annotated[
        str | None,
        typer.Option(
            help='Ray Serve\'s, as JSON, instead of --replicas: {"min_replicas": 1, "max_replicas": 4}',
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Texts written at once by a replica.")] = 32,
    waiting: Annotated[int, typer.Option(min=0, help="Texts that may wait; beyond that, 429.")] = 512,
    texts_per_request: Annotated[
        int, typer.Option(min=1, help="Most prompts times samples in a request.")
    ] = 128,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.1, help="Longest time of a request; then it is answered with 408.")
    ] = 300,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="float32 is what was measured; bfloat16 is faster.")
    ] = "float32",
    address: Address = None,
    in_process: InProcess = False,
    dashboard: Dashboard = False,
) -> None:
    """Serve the forest behind an OpenAI-compatible endpoint. Callers need the key in BTM_API_KEY, if set.

    With a plan the experts are mixed as it says; with --store alone, by the paper's posterior.
    """
    location, plan = forest_place("serve", plan_path, store)
    check_shadowing()
    _check_extra()
    scaling = _autoscaling(autoscaling)
    with opened_view() as view:
        from btm_cluster.operations.serve import (
            Endpoint,
            RayCluster,
            check_serve_call,
            follower,
            serve_in_process,
            serve_on_ray,
        )

        endpoint = Endpoint(host, port)
        check_serve_call(endpoint, new_server=in_process or address is None)
        mixture = _mixture(view, plan, location, forest_version, address, in_process)
    from btm_cluster.serving.forest import LiveForest
    from btm_cluster.serving.http_errors import digest_of
    from btm_cluster.serving.settings import API_KEY, ForestArguments, ServingSettings

    key = os.environ.get(API_KEY)
    settings = ServingSettings(
        rows,
        waiting,
        texts_per_request,
        timeout_seconds,
        precision=precision,
        key_digest=digest_of(key) if key else None,
    )
    arguments = ForestArguments(
        store=location,
        forest_version=forest_version,
        settings=settings,
        replicas=replicas,
        gpus_per_replica=gpus_per_replica,
        cpus_per_replica=cpus_per_replica,
        autoscaling=scaling,
    )
    newer = follower(plan, location) if forest_version is None else None
    ready = partial(_say_ready, endpoint, mixture, settings)
    if in_process:
        live = LiveForest(open_ledger(location), settings)
        asyncio.run(serve_in_process(live, mixture, newer, endpoint, ready))
        return
    given = None if plan is None else mixture
    serve_on_ray(arguments, given, newer, endpoint, RayCluster(address, dashboard), ready)


def _check_extra() -> None:
    try:
        import fastapi
        import uvicorn

        assert fastapi
        assert uvicorn
    except ImportError as exc:
        raise UserError(
            "btm serve needs packages that are not installed",
            found=str(exc),
            remedy="pip install 'btm-cluster[serve]'",
        ) from exc


def _autoscaling(given: str | None) -> dict[str, Any] | None:
    if given is None:
        return None
    try:
        found = json.loads(given)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            "--autoscaling is no JSON object",
            found=given,
            expected='such as {"min_replicas": 1, "max_replicas": 4}',
        )
    return found


def _mixture(
    view: "ProgressView",
    plan: Plan | None,
    store: str,
    version: int | None,
    address: str | None,
    in_process: bool,
) -> "Mixture":
    from btm_cluster.operations.serve import mixture_to_serve
    from btm_cluster.steps.mixture import mixture_of_store

    if plan is None:
        return mixture_of_store(open_ledger(store), version)
    with driving(view, plan, address, in_process or address is None, command="serve") as driver:
        return mixture_to_serve(plan, driver, version)


def _say_ready(endpoint: "Endpoint", mixture: "Mixture", settings: "ServingSettings") -> None:
    from btm_cluster.serving.settings import API_KEY

    url = endpoint.url
    print(f"forest version {mixture.version} answers at {url}/v1: {', '.join(mixture.domains)}")
    key = "" if settings.key_digest is None else f'-H "Authorization: Bearer ${API_KEY}" '
    print(
        f"curl {url}/v1/completions -H 'Content-Type: application/json' {key}"
        """-d '{"model": "ensemble", "prompt": "Once", "max_tokens": 20}'""",
        flush=True,
    )
    if not endpoint.is_loopback and settings.key_digest is None:
        print("note: whoever reaches this machine can use it: set BTM_API_KEY to a key", file=sys.stderr)
