"""ASGI middleware around every route: headers of each answer, and the limit of a body."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.protocol import ANSWER_HEADERS


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
