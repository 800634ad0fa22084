"""The HTTP application: OpenAI's completions, models, domains, health and metrics over a live forest."""

import functools
from typing import Any

from fastapi import Depends, FastAPI, Request, Response

from btm_cluster.errors import ClosedError, UnknownModelError
from btm_cluster.serving.calls import CompletionCall, until_gone, within
from btm_cluster.serving.completions import CompletionRequest, DomainsRequest
from btm_cluster.serving.domains import domains_of
from btm_cluster.serving.forest import LiveForest, LoadedForest
from btm_cluster.serving.http_errors import BodyLimit, add_error_handlers, check_key
from btm_cluster.serving.metrics import Metrics


def build_app(live: LiveForest) -> FastAPI:
    """The application over a live forest.

    Where an API key is set, all calls need it, as `Authorization: Bearer KEY`, but for /healthz and the API's own
    description at /docs.
    """
    needs_key = Depends(functools.partial(check_key, live.settings.key_digest))
    app = FastAPI(title="btm", summary="A forest of expert language models.", docs_url="/docs")
    metrics = Metrics()
    add_error_handlers(app)

    @app.post("/v1/completions", dependencies=[needs_key], response_model=None)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        call = CompletionCall(live, body, request, metrics)
        if body.stream:
            return await call.stream()
        return Response((await call.answer()).model_dump_json(), media_type="application/json")

    @app.post("/v1/domains", dependencies=[needs_key])
    async def domains(body: DomainsRequest, request: Request) -> dict[str, Any]:
        settings = live.settings
        with live.current.in_use() as forest:
            call = domains_of(forest, body, settings)
            found = await within(settings.timeout_seconds, until_gone(request, call))
            return {
                "object": "list",
                "forest_version": forest.mixture.version,
                "data": [one.model_dump() for one in found],
            }

    @app.get("/v1/models", dependencies=[needs_key])
    async def models() -> dict[str, Any]:
        served = live.current
        return {"object": "list", "data": [_model_row(served, name) for name in served.model_names]}

    @app.get("/v1/models/{name}", dependencies=[needs_key])
    async def model(name: str) -> dict[str, Any]:
        served = live.current
        if name not in served.model_names:
            raise UnknownModelError(f"no model {name!r}", expected=f"one of {', '.join(served.model_names)}")
        return _model_row(served, name)

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        current = live.current
        if current.failure is not None:
            raise ClosedError("the engine has failed", found=str(current.failure))
        return {"status": "ok", "forest_version": current.mixture.version}

    @app.get("/metrics", dependencies=[needs_key])
    async def metrics_page() -> Response:
        return Response(metrics.page(live.current), media_type="text/plain; version=0.0.4")

    app.add_middleware(BodyLimit, most_bytes=live.settings.body_bytes)
    return app


def _model_row(forest: LoadedForest, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": f"forest version {forest.mixture.version}",
        "max_model_len": forest.mixture.block_tokens,
    }
