"""The ceiling: Starlette with a JSON body in and a JSON body out, and no database."""

from __future__ import annotations

import json

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

WEBHOOK = {"webhook_id": "x", "url": "https://example.com/", "events": ["game_started"], "team": "ne"}


async def register(request: Request) -> JSONResponse:
    json.loads(await request.body())
    return JSONResponse({**WEBHOOK, "message": "Webhook registered successfully"}, 201)


async def get(request: Request) -> JSONResponse:
    return JSONResponse(WEBHOOK)


app = Starlette(
    routes=[
        Route("/api/v1/webhooks/register", register, methods=["POST"]),
        Route("/api/v1/webhooks/{webhook_id}", get),
        Route("/ready", get),
    ]
)
