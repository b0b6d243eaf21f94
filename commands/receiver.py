"""A receiver for trying deliveries out: it prints each delivery, and whether its signature holds."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hookline import signing
from hookline.errors import visible

MAX_BODY = 16 * 1024**2  # bytes

Show = Callable[[str], None]


def run(listener: socket.socket, status: int, secret: str, show: Show) -> None:
    """Answer every POST with `status`, until SIGINT or SIGTERM. Raises the OSError of `show` if its output has gone."""
    failures: list[OSError] = []

    async def receive(request: Request) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                return Response(status_code=413, headers={"Connection": "close"})
        problem = signing.problem(dict(request.headers), body, secret, time.time())
        header = request.headers.get("X-Webhook-Event", "no event type")
        kind = header.encode("latin-1").decode(errors="surrogateescape")
        try:
            show(f"{visible(kind)}: {visible(body.decode(errors='replace'))}")
            show(f"  signature: {'does not hold: ' + problem if problem else 'holds'}")
        except OSError as exc:
            failures.append(exc)
            signal.raise_signal(signal.SIGINT)
        return Response(status_code=status)

    log = logging.getLogger("uvicorn.error")
    log.addHandler(Faults(show))
    log.propagate = False
    application = Starlette(routes=[Route("/{path:path}", receive, methods=["POST"])])
    config = uvicorn.Config(application, lifespan="off", ws="none", log_config=None, access_log=False)
    Receiver(config).run([listener])
    if failures:
        raise failures[0]


class Receiver(uvicorn.Server):
    """Ends at a signal without passing it on: this is how the receiver is meant to end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Faults(logging.Handler):
    """Shows a request that is not clean HTTP as one line."""

    def __init__(self, show: Show) -> None:
        super().__init__(logging.WARNING)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        with suppress(OSError):
            self.show(f"a request could not be read: {kind.__name__ if kind else visible(record.getMessage())}")
