"""Health checks for a supervisor: /health while the process runs, /ready while it can serve and deliver."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from hookline import deliveries
from hookline.errors import Conflict, Unavailable
from hookline.store import schema
from web.services import services_of

DATABASE_TIMEOUT = 5  # seconds that the database has to answer for /ready


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Answer 200 if the database answers, takes writes and is migrated, and a worker runs; else 503 with the reason."""
    services = services_of(request)
    storage = services.storage
    try:
        async with asyncio.timeout(DATABASE_TIMEOUT):
            await storage.read(schema.require_usable)
            problem = await storage.read(services.worker_problem)
            oldest = await storage.read(deliveries.oldest_due)
    except TimeoutError:
        return JSONResponse({"detail": f"the database does not answer within {DATABASE_TIMEOUT} s"}, 503)
    except (Conflict, Unavailable) as exc:
        return JSONResponse({"detail": str(exc)}, 503)
    if problem is not None:
        return JSONResponse({"detail": problem}, 503)
    return JSONResponse({"status": "ready", "oldest_due_seconds": round(oldest, 3)})


routes: list[BaseRoute] = [Route("/health", health), Route("/ready", ready)]
