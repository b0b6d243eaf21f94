"""ASGI middleware around every route: headers of each answer, and the limit of a body. Who may call: see access.py."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.protocol import ANSWER_HEADERS


class AnswerHeaders:
    """Adds headers to each answer: caches do not keep it, and browsers do not guess another type for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ANSWER_HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers)


class BodyLimit:
    """Answers 413, in JSON, to a body of more than `max_body` bytes, whether its length was declared or not."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app = app
        self.max_body = max_body
        self.detail = f"The body is over the limit of {max_body} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):  # their bodies are never read
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            await JSONResponse({"detail": self.detail}, 413, {"Connection": "close"})(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            try:
                message = await receive()
            except asyncio.CancelledError:  # the service stops before the whole body has come
                raise HTTPException(503, "The service is stopping: nothing was stored, try again") from None
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(413, self.detail)
            return message

        await self.app(scope, limited, send)
