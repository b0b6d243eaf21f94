"""Errors as HTTP answers: the one map from the domain's errors to statuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from hookline.errors import Conflict, HooklineError, Invalid, NotFound, TooLarge, Unavailable
from web.parsing import Unprocessable
from web.protocol import ANSWER_HEADERS

log = logging.getLogger("hookline")

STATUSES: dict[type[HooklineError], int] = {NotFound: 404, Conflict: 409, Invalid: 422, TooLarge: 413, Unavailable: 503}


async def domain_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, Unavailable):
        log.error("%s %r: %s", request.method, request.scope["path"], exc)
    status = next(status for kind, status in STATUSES.items() if isinstance(exc, kind))
    return JSONResponse({"detail": str(exc)}, status)


async def unprocessable(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Unprocessable)
    return JSONResponse({"detail": exc.detail}, 422)


async def http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return JSONResponse({"detail": exc.detail}, exc.status_code, exc.headers)


async def unexpected(request: Request, exc: Exception) -> Response:
    # Starlette makes this answer outside our middleware.
    headers = {name.decode(): value.decode() for name, value in ANSWER_HEADERS}
    return JSONResponse({"detail": "Internal server error"}, 500, headers)


async def client_left(request: Request, exc: Exception) -> None:
    """Answer nothing and log nothing: the client closed the connection within its request."""


exception_handlers: Mapping[Any, Any] = {
    **dict.fromkeys(STATUSES, domain_error),
    Unprocessable: unprocessable,
    HTTPException: http_error,
    ClientDisconnect: client_left,
    Exception: unexpected,
}
