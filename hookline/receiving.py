"""A receiver for trying deliveries out: it prints each delivery, and whether its signature holds."""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from hookline import signing
from hookline.errors import visible

MAX_BODY = 16 * 1024**2  # bytes

Show = Callable[[str], None]


def run(listener: socket.socket, status: int, secret: str, show: Show) -> None:
    """Answer every POST with `status`, until SIGINT or SIGTERM. Raises the OSError of `show` if its output has gone."""
    failures: list[OSError] = []

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        problem = signing.problem(dict(request.headers), body, secret, time.time())
        kind = request.headers.get("X-Webhook-Event", "no event type")
        try:
            show(f"{visible(kind)}: {visible(body.decode(errors='replace'))}")
            show(f"  signature: {'does not hold: ' + problem if problem else 'holds'}")
        except OSError as exc:
            failures.append(exc)
            signal.raise_signal(signal.SIGINT)
        return web.Response(status=status)

    log = logging.getLogger("aiohttp.server")
    log.addHandler(Faults(show))
    log.propagate = False
    application = web.Application(client_max_size=MAX_BODY)
    application.router.add_post("/{path:.*}", receive)
    web.run_app(application, sock=listener, print=None, access_log=None)
    if failures:
        raise failures[0]


class Faults(logging.Handler):
    """Shows a request that is not clean HTTP as one line: aiohttp would log a traceback with its content."""

    def __init__(self, show: Show) -> None:
        super().__init__(logging.ERROR)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        with suppress(OSError):
            self.show(f"a request could not be read: {kind.__name__ if kind else visible(record.getMessage())}")
