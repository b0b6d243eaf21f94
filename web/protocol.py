"""Sockets and connections, below the routes: uvicorn's, with JSON where uvicorn would answer in plain text."""

from __future__ import annotations

import errno
import json
import socket
from contextlib import suppress

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

ANSWER_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
BACKLOG = 2048  # connections that may wait to be accepted
NOT_HTTP = "This cannot be read as an HTTP/1.1 request: its method, path, headers or length is malformed"
NO_UPGRADE = "This service speaks HTTP/1.1 alone: send the request without the header Upgrade"


class Server(uvicorn.Server):
    """uvicorn's server, which prints its URL once it accepts connections."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = self.config.host, sockets[0].getsockname()[1]
            with suppress(OSError):  # nothing reads our output, or the disk behind it is full
                print(f"Hookline serves on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a listening socket on each address of `host`; port 0 takes any free port. Raises OSError with a sentence."""
    sockets: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in addresses:
            sockets.append(socket.create_server((address[0], port, *address[2:]), family=family, backlog=BACKLOG))
            port = sockets[0].getsockname()[1]
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} on {host} is in use") from None
        raise OSError(f"it cannot listen on HOST {host}, PORT {port}: {exc.strerror}") from None
    except UnicodeError:  # from getaddrinfo: a part of the name is empty or too long
        raise OSError(f"it cannot listen on HOST {host}: this is not the name of a host") from None
    return sockets


class Protocol(HttpToolsProtocol):
    """One connection. Answers 400, in JSON, to anything but HTTP, and to an upgrade that cannot be ignored."""

    refusal = NOT_HTTP

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and (self._get_upgrade() == b"websocket" or self.has_body()):
            self.refusal = NO_UPGRADE
            raise ValueError(NO_UPGRADE)  # ends in send_400_response
        super().on_headers_complete()
        self.headers = []  # the parser adds trailers to this list: they must not become headers of the request

    def has_body(self) -> bool:
        """Tell whether a body follows. With an upgrade the parser would take it for the new protocol, and drop it."""
        headers = dict(self.headers)
        return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: clients that offer HTTP/2, such as `curl --http2`, are answered in HTTP/1.1."""

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # a whole request is being answered: close after it
            return
        body = json.dumps({"detail": self.refusal}).encode()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *ANSWER_HEADERS,
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[400], *lines, b"\r\n", body]))
        self.transport.close()
