"""One HTTP/1.1 connection: a request goes out in one write, the answer is read as far as it is kept, and no further.

Parsing is llhttp's (httptools). What a peer may send is bounded: interim answers, the head, the number of headers, the
body. Nothing that a peer does raises anything but Broken, whose sentence goes into the log of attempts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

KEPT = 1024  # bytes of an answer's body
MAX_HEAD = 64 * 1024  # bytes of all heads of an answer, interim ones included
MAX_HEADERS = 200
MAX_INTERIM = 8  # answers (1xx) before the final one

NO_ANSWER = "the endpoint closed the connection without an answer"
RESET = "the endpoint reset the connection"
CUT_OFF = "the answer was cut off"
NOT_HTTP = "the answer is not HTTP"
LONG_HEAD = f"the head of the answer is longer than {MAX_HEAD // 1024} KiB"
MANY_HEADERS = f"the answer has more than {MAX_HEADERS} headers"
MANY_INTERIM = f"more than {MAX_INTERIM} interim answers came before the final one"
SWITCHING = "answered 101: other protocols are not spoken"


class Broken(Exception):
    """No usable answer came. `is_stale`: a kept connection ended before any byte of one, so a new one may be tried."""

    def __init__(self, sentence: str, *, is_stale: bool = False) -> None:
        super().__init__(sentence)
        self.is_stale = is_stale


class Answer(NamedTuple):
    status: int
    body: bytes  # at most KEPT bytes
    retry_after: bytes | None


class Connection(asyncio.Protocol):
    """Carries one request at a time. `on_idle` is told when it can carry the next one, `on_closed` when it is gone."""

    def __init__(self, on_idle: Callable[[Connection], None], on_closed: Callable[[Connection], None]) -> None:
        self._on_idle, self._on_closed = on_idle, on_closed
        self._transport: asyncio.Transport | None = None
        self._answering: asyncio.Future[Answer] | None = None
        self._used = False  # has it carried a request before this one?
        self._parser = HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        self._transport.pause_reading()  # until something has been asked: who speaks before is heard then

    @property
    def peer(self) -> str:
        """The address that it is connected to."""
        assert self._transport is not None
        return str(self._transport.get_extra_info("peername")[0])

    async def request(self, data: bytes) -> Answer:
        """Send this request; returns the answer. Raises Broken. Who cancels it closes the connection."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise Broken(NO_ANSWER, is_stale=True)
        self._received = 0  # bytes, before the end of the final head
        self._interim = self._headers = self._head = 0
        self._status = 0  # of the final answer, once its head is there
        self._has_length = False
        self._retry_after: bytes | None = None
        self._body = b""
        self._problem = ""
        self._whole = self._reusable = False
        self._answering = asyncio.get_running_loop().create_future()
        transport.write(data)
        if not self._used:
            transport.resume_reading()
        try:
            return await self._answering
        except asyncio.CancelledError:
            self._answering = None
            transport.abort()
            raise

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answering is None:  # nobody has asked for anything
            self.close()
            return
        if not self._status:
            self._received += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._end(SWITCHING)
            return
        except HttpParserError:  # also of our callbacks
            if self._whole:  # it is only what comes behind the answer
                self._finish(reusable=False)
            else:
                self._end(self._problem or NOT_HTTP)
            return
        if self._whole:
            self._finish(reusable=self._reusable)
        elif self._status and len(self._body) >= KEPT:
            self._finish(reusable=False)  # the rest is not read
        elif not self._status and self._received > MAX_HEAD:
            self._end(LONG_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_closed(self)
        if self._answering is None:
            return
        if self._status and not self._has_length and exc is None:  # its end is that of the connection
            self._finish(reusable=False)
        elif self._received or self._status:
            self._end(CUT_OFF)
        else:
            self._end(RESET if exc is not None else NO_ANSWER, is_stale=self._used)

    # llhttp's callbacks. An exception in one of them ends the parsing at once.

    def on_message_begin(self) -> None:
        if self._whole:
            self._refuse(NOT_HTTP)  # a second answer: it ends the parsing, and the first one counts
        if self._interim > MAX_INTERIM:
            self._refuse(MANY_INTERIM)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._head += len(name) + len(value)
        if self._headers > MAX_HEADERS:
            self._refuse(MANY_HEADERS)
        if self._head > MAX_HEAD:
            self._refuse(LONG_HEAD)
        name = name.lower()
        if name == b"retry-after":
            self._retry_after = value
        elif name == b"content-length" or (name == b"transfer-encoding" and b"chunked" in value.lower()):
            self._has_length = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 101:
            self._refuse(SWITCHING)
        if 100 <= status < 200:
            self._interim += 1
            self._retry_after, self._has_length = None, False
            return
        if not 200 <= status < 600:
            self._refuse(f"answered {status:03}, which is not a status of HTTP")
        self._status = status

    def on_body(self, body: bytes) -> None:
        if self._status and len(self._body) < KEPT:
            self._body += body[: KEPT - len(self._body)]

    def on_message_complete(self) -> None:
        if self._status:
            self._whole, self._reusable = True, bool(self._parser.should_keep_alive())

    def _refuse(self, problem: str) -> None:
        self._problem = problem
        raise ValueError(problem)

    def _finish(self, *, reusable: bool) -> None:
        answering, self._answering = self._answering, None
        assert answering is not None
        transport = self._transport
        if transport is not None:
            if reusable and not transport.is_closing() and not transport.get_write_buffer_size():
                self._used = True
                self._on_idle(self)
            else:
                transport.abort()
        if not answering.done():
            answering.set_result(Answer(self._status, self._body, self._retry_after))

    def _end(self, problem: str, *, is_stale: bool = False) -> None:
        answering, self._answering = self._answering, None
        self.close()
        if answering is not None and not answering.done():
            answering.set_exception(Broken(problem, is_stale=is_stale))
