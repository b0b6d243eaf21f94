"""What a supervisor asks: is it alive, is it ready; and the one map from errors to statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hookline import deliveries
from hookline.errors import Conflict, HooklineError, Invalid, NotFound, TooLarge, Unavailable
from hookline.store import schema
from hookline.worker import heartbeat
from web.protocol import ANSWER_HEADERS
from web.schemas import Refused

log = logging.getLogger("hookline")

ANSWER_WITHIN = 5  # seconds that the database has for /ready
STATUSES: dict[type[HooklineError], int] = {NotFound: 404, Conflict: 409, Invalid: 422, TooLarge: 413, Unavailable: 503}


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 once requests can be served: the database answers, takes writes and is migrated, a worker beats."""
    storage, worker = request.app.state.storage, request.app.state.worker
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            await storage.read(schema.require_usable, storage.db)
            elsewhere = await storage.read(heartbeat.problem, storage.db) if worker is None else None
            oldest = await storage.read(deliveries.oldest_due, storage.db)
    except TimeoutError:
        return JSONResponse({"detail": f"the database does not answer within {ANSWER_WITHIN} s"}, 503)
    except (Conflict, Unavailable) as exc:
        return JSONResponse({"detail": str(exc)}, 503)
    if (problem := worker.problem(worker) or elsewhere) is not None:
        return JSONResponse({"detail": problem}, 503)
    return JSONResponse({"status": "ready", "oldest_due_seconds": round(oldest, 3)})


async def domain_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, Unavailable):
        log.error("%s %r: %s", request.method, request.scope["path"], exc)
    return JSONResponse(
        {"detail": str(exc)}, next(status for kind, status in STATUSES.items() if isinstance(exc, kind))
    )


async def refused(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refused)
    return JSONResponse({"detail": exc.detail}, 422)


async def http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"detail": exc.detail}, exc.status_code, exc.headers)


async def unexpected(request: Request, exc: Exception) -> Response:
    headers = {name.decode(): value.decode() for name, value in ANSWER_HEADERS}  # nothing of ours is around this one
    return JSONResponse({"detail": "Internal server error"}, 500, headers)


async def gone(request: Request, exc: Exception) -> None:
    """Whoever sent half a request and left gets no answer, and the log no line."""


exception_handlers: Mapping[Any, Any] = {
    **dict.fromkeys(STATUSES, domain_error),
    Refused: refused,
    HTTPException: http_error,
    ClientDisconnect: gone,
    Exception: unexpected,
}


class AnswerHeaders:
    """ASGI middleware: no answer is kept by a cache or read as another type than it says."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ANSWER_HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers)


class BodyLimit:
    """ASGI middleware: a body over the limit is a 413 in JSON, whether its length was declared or not."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app = app
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):  # their bodies are never read
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            detail = f"The body is over the limit of {self.max_body} bytes"
            await JSONResponse({"detail": detail}, 413, {"Connection": "close"})(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            try:
                message = await receive()
            except asyncio.CancelledError:  # the server stops, and half a body has come
                raise HTTPException(503, "The service is stopping: nothing was stored, try again") from None
            taken += len(message.get("body", b""))
            if taken > self.max_body:
                raise HTTPException(413, f"The body is over the limit of {self.max_body} bytes")
            return message

        await self.app(scope, limited, send)


routes: list[BaseRoute] = [Route("/health", health), Route("/ready", ready)]
