"""Errors as OpenAI's clients read them, the check of an API key, and the limit of a body."""

import difflib
import hashlib
import hmac
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from btm_cluster.errors import BtmError, BusyError, ClosedError, UnknownModelError, UserError
from btm_cluster.serving.completions import CompletionRequest, DomainsRequest

GONE = 499
"""Nobody reads the answer: nginx's status, for metrics and logs."""

STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (UnknownModelError, 404, "model_not_found"),
    (UserError, 400, "invalid_request"),
    (BusyError, 429, "too_many_requests"),
    (ClosedError, 503, "unavailable"),
    (TimeoutError, 408, "timeout"),
    (ClientDisconnect, GONE, "gone"),
)
"""HTTP status and code of an error, the first that fits; all others are 500."""

CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}

ADDRESSES = (
    "there are /v1/completions, /v1/models, /v1/domains, /healthz and /metrics; "
    "no chat: send messages as a prompt, rendered by the chat template"
)


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def digest_of(key: str) -> str:
    """The hash of an API key, which is all that is kept of it."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_key(key_digest: str | None, request: Request) -> None:
    """Refuses a call without the key that has this hash; None: any call may come.

    Raises:
        HTTPException: 401.
    """
    if key_digest is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(digest_of(given), key_digest):
        raise HTTPException(
            401,
            "no API key, or a wrong one: give it as `Authorization: Bearer KEY`",
            {"WWW-Authenticate": "Bearer"},
        )


def as_error(exc: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status of an exception, and the body that says so."""
    for kind, status, code in STATUS:
        if isinstance(exc, kind):
            message = str(exc) or "the request took longer than this server allows"
            return status, error_body(message, _type_of(status), code)
    message = str(exc) if isinstance(exc, BtmError) else f"{type(exc).__name__}: {exc}"
    return 500, error_body(message, "server_error", "internal")


def _type_of(status: int) -> str:
    return "invalid_request_error" if status < 429 else "server_error"


def add_error_handlers(app: FastAPI) -> None:
    """Every error is answered in the form that OpenAI's clients read."""

    async def say(_: Request, exc: Exception) -> JSONResponse:
        status, body = as_error(exc)
        return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)

    async def say_invalid(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        message = "; ".join(_what_is_wrong(one) for one in exc.errors())
        return JSONResponse(error_body(message, "invalid_request_error", "invalid_request"), 400)

    async def say_refused(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        message = str(exc.detail)
        if exc.status_code == 404:
            message = f"nothing is at {request.url.path}: {ADDRESSES}"
        if exc.status_code == 405 and exc.headers:
            message = f"{request.url.path} takes {exc.headers['Allow']}, not {request.method}"
        body = error_body(message, _type_of(exc.status_code), CODES.get(exc.status_code))
        return JSONResponse(body, exc.status_code, exc.headers)

    app.add_exception_handler(RequestValidationError, say_invalid)
    app.add_exception_handler(HTTPException, say_refused)
    # An Exception of another kind is raised on, for the server's log.
    for kind in (BtmError, TimeoutError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, say)


def _what_is_wrong(found: dict[str, Any]) -> str:
    """One fault of a body: where, and what."""
    if found["type"] == "json_invalid":
        return f"the body is no JSON: {found['ctx']['error']}, at character {found['loc'][-1]}"
    if found["type"] == "model_attributes_type" and len(found["loc"]) == 1:
        return "the body is no JSON object, or it comes without the header `Content-Type: application/json`"
    place = ".".join(map(str, found["loc"][1:])) or "the body"
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        fields = (*CompletionRequest.model_fields, *DomainsRequest.model_fields)
        near = difflib.get_close_matches(str(found["loc"][-1]), fields, 1)
        message = "there is no such field" + (f"; did you mean {near[0]}?" if near else "")
    return f"{place}: {message}"


class BodyLimit:
    """Refuses bodies that are too long before they are read as a whole."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most, taken = self._most_bytes, 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            error = error_body(_too_long(most), "invalid_request_error", CODES[413])
            await JSONResponse(error, 413)(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, _too_long(most))
            return message

        await self._app(scope, counted, send)


def _too_long(most: int) -> str:
    return f"the body is too long: at most {most:,} bytes are read"
