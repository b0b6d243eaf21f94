"""The one HTTP client that delivers. `post` never raises for what the other side does: that is the attempt's outcome.

kept connection to the origin?  ── yes → request ─┐
no → look the name up → guard → connect (TLS) ────┴→ answer, read as far as it is kept → connection kept, or closed
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import chain, zip_longest
from typing import Any, NoReturn

from hookline import clock
from hookline.egress.connection import Answer, Broken, Connection
from hookline.egress.guard import (
    NAME_REFUSED,
    OWN_REFUSED,
    Listening,
    Network,
    leads_here,
    literal_refusal,
    port_refusal,
    refusal,
)
from hookline.egress.names import Addresses, LookupFailed, Names
from hookline.egress.targets import Origin, Target, target_of
from hookline.errors import visible
from hookline.policy import Result

CONNECT_TIMEOUT = 10.0  # seconds, TLS included
STAGGER = 0.25  # seconds between the starts of connections to the addresses of one name (RFC 8305)
IDLE_TIMEOUT = 30.0  # seconds that an unused connection is kept
MAX_IDLE = 2000  # connections that are kept in all
MAX_IDLE_PER_ORIGIN = 64
QUIET = 60.0  # seconds between two lines in the log about one host
MAX_QUIET = 1000  # hosts that are remembered for that
TIMED_OUT = "timed out after {:g} s"
UNUSABLE = "the URL or a header cannot be used"

log = logging.getLogger("hookline")


class Refused(Exception):
    """The guard does not let us connect to any address that could be reached. The sentence is for the attempt log."""


class Client:
    """Posts deliveries. `timeout`: seconds for everything up to the last byte read of the answer.

    `own`: where this process listens. It never connects there, allowed or not: a delivery to itself would be answered
    by another delivery.
    """

    def __init__(
        self,
        *,
        allowed: Sequence[Network] = (),
        timeout: float = 15,
        own: Listening | None = None,
        names: Names | None = None,
    ) -> None:
        self.allowed = tuple(allowed)
        self.timeout = timeout
        self.own = own
        self.names = names or Names()
        self._idle: dict[Origin, list[Connection]] = {}  # the one used last is used next
        self._idle_since: OrderedDict[Connection, tuple[Origin, float]] = OrderedDict()  # the oldest one first
        self._tls: ssl.SSLContext | None = None
        self._warned: dict[str, float] = {}  # by host: when, of time.monotonic()

    async def start(self) -> None:
        self._closing_idle = asyncio.get_running_loop().create_task(self._close_idle())

    async def close(self) -> None:
        self._closing_idle.cancel()
        for connection in list(self._idle_since):
            connection.close()
        await asyncio.gather(self._closing_idle, return_exceptions=True)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Result:
        """Make one attempt. Raises `names.Busy` if the name could not be looked up for lack of a thread."""
        started_at, start = clock.now(), time.perf_counter()
        status_code = response = error = wait = None
        try:
            target = target_of(url)
            answer = await self._answer(target, url, request_of(target, body, headers))
            status_code, response = answer.status, answer.body.decode(errors="replace").replace("\0", "\ufffd")
            if status_code >= 300:
                error, wait = sentence_for_status(status_code), retry_after(answer.retry_after, started_at)
        except (Broken, Refused, LookupFailed) as exc:
            error = str(exc)
        except TimeoutError:
            error = TIMED_OUT.format(self.timeout)
        except ssl.SSLError as exc:
            error = f"TLS failed: {tls_reason(exc)}"
        except OSError as exc:
            error = connect_reason(exc)
        except ValueError:  # of the URL or a header; its text may hold a secret
            error = literal_refusal(url, self.allowed) or UNUSABLE
        duration_ms = round((time.perf_counter() - start) * 1000)
        return Result(started_at, duration_ms, status_code, error, response, wait)

    async def _answer(self, target: Target, url: str, request: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout
        if (kept := self._take_idle(target.origin)) is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    return await kept.request(request)
            except Broken as exc:
                if not exc.is_stale:
                    raise
        deadline += await self.names.ready(target.origin.host)
        async with asyncio.timeout_at(deadline):
            addresses = await self._addresses(target, url)
            connection = await self._connect(target.origin, addresses, url)
            return await connection.request(request)

    async def _addresses(self, target: Target, url: str) -> Addresses:
        try:
            return await self.names.addresses(target.origin.host)
        except LookupFailed:
            if (literal := literal_refusal(url, self.allowed)) is not None:
                raise Refused(literal) from None
            raise

    async def _connect(self, origin: Origin, addresses: Addresses, url: str) -> Connection:
        """Connect to the first address that answers, each a moment after the one before (RFC 8305).

        Raises Refused if the guard refused one and no other could be reached, else what went wrong with the last one.
        """
        waiting = in_turns(addresses)
        attempts: set[asyncio.Task[Connection]] = set()
        refused: Refused | None = None
        failure: Exception | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT) as limit:
                while waiting or attempts:
                    if waiting:
                        family, address = waiting.pop(0)
                        try:
                            self._check(origin, address, url)
                        except Refused as exc:
                            refused = exc
                            continue
                        attempts.add(asyncio.ensure_future(self._connect_to(origin, family, address, url)))
                    pause = STAGGER if waiting else None
                    done, attempts = await asyncio.wait(attempts, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                    for attempt in done:
                        if attempt.exception() is None:
                            return attempt.result()
                        failure = attempt.exception()  # type: ignore[assignment]
        except TimeoutError:
            if limit.expired():
                raise Broken(f"connecting timed out after {CONNECT_TIMEOUT:g} s") from None
            raise
        finally:
            for attempt in attempts:
                attempt.add_done_callback(close_unused)
                attempt.cancel()
        if refused is not None:
            raise refused
        raise failure or Broken("cannot connect to any of its addresses")

    async def _connect_to(
        self, origin: Origin, family: socket.AddressFamily, address: tuple[Any, ...], url: str
    ) -> Connection:
        loop = asyncio.get_running_loop()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, (address[0], origin.port, *address[2:]))
            self._check(origin, sock.getpeername(), url)
            tls = self._context() if origin.is_tls else None
            _, connection = await loop.create_connection(
                lambda: Connection(partial(self._keep, origin), self._forget),
                sock=sock,
                ssl=tls,
                server_hostname=origin.host if tls else None,
            )
        except ConnectionError as exc:
            sock.close()
            if not isinstance(exc, ConnectionRefusedError) and origin.is_tls:
                raise Broken("TLS failed: the endpoint closed the connection") from exc
            raise
        except BaseException:
            sock.close()
            raise
        return connection

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = tls_context()
        return self._tls

    # Kept connections

    def _take_idle(self, origin: Origin) -> Connection | None:
        kept = self._idle.get(origin)
        if not kept:
            return None
        connection = kept.pop()
        del self._idle_since[connection]
        if not kept:
            del self._idle[origin]
        return connection

    def _keep(self, origin: Origin, connection: Connection) -> None:
        kept = self._idle.setdefault(origin, [])
        if len(kept) >= MAX_IDLE_PER_ORIGIN:
            connection.close()
            return
        kept.append(connection)
        self._idle_since[connection] = origin, time.monotonic()
        if len(self._idle_since) > MAX_IDLE:
            next(iter(self._idle_since)).close()

    def _forget(self, connection: Connection) -> None:
        """It has been closed, by whomever."""
        if (since := self._idle_since.pop(connection, None)) is not None:
            kept = self._idle[since[0]]
            kept.remove(connection)
            if not kept:
                del self._idle[since[0]]

    async def _close_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_TIMEOUT / 4)
            limit = time.monotonic() - IDLE_TIMEOUT
            for connection, (_, since) in list(self._idle_since.items()):
                if since > limit:
                    break
                connection.close()

    # The guard

    def _check(self, origin: Origin, address: tuple[Any, ...], url: str) -> None:
        """Raises Refused if a socket must not connect to this address."""
        if (reason := refusal(address[0], self.allowed)) is not None:
            self._refuse(origin.host, reason, literal_refusal(url, self.allowed) or NAME_REFUSED)
        if (reason := port_refusal(address[0], origin.port, self.allowed)) is not None:
            self._refuse(origin.host, reason, reason)
        if leads_here((address[0], origin.port), self.own):
            self._refuse(origin.host, f"{address[0]}: {OWN_REFUSED}", OWN_REFUSED)

    def _refuse(self, host: str, logged: str, recorded: str) -> NoReturn:
        now = time.monotonic()
        if now - self._warned.get(host, -QUIET) >= QUIET:
            if len(self._warned) >= MAX_QUIET:
                self._warned.clear()
            self._warned[host] = now
            log.warning("no delivery to %s: %s", visible(host), logged)
        raise Refused(recorded)


def request_of(target: Target, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Head and body in one piece: two writes cost twice as much. Raises ValueError for a header that ends its line."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\n") != len(headers) or lines.count("\r") != len(headers) or "\0" in lines:
        raise ValueError("a header of more than one line")
    return f"{target.head}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def in_turns(addresses: Addresses) -> Addresses:
    """The addresses of both families in turns, that of the first one first (RFC 8305, 4)."""
    first = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    return [address for address in chain.from_iterable(zip_longest(first, others)) if address is not None]


def close_unused(attempt: asyncio.Task[Connection]) -> None:
    """Close a connection that was made though another one was faster."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def tls_context() -> ssl.SSLContext:
    """TLS 1.2 or later, with the system's roots, or certifi's where the system has none."""
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if not paths.cafile and not (paths.capath and os.listdir(paths.capath)):
        try:
            import certifi  # type: ignore[import-not-found]
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


def tls_reason(exc: ssl.SSLError) -> str:
    return getattr(exc, "verify_message", None) or exc.reason or "the certificate does not verify"


def connect_reason(error: OSError) -> str:
    """In the system's words: the exception's own name addresses."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return f"cannot connect: {os.strerror(error.errno)}" if error.errno else "cannot connect to any of its addresses"


def sentence_for_status(status: int) -> str:
    return f"answered {status}" + (": redirects are not followed" if status < 400 else "")


def retry_after(value: bytes | None, now: datetime) -> float | None:
    """Seconds that an endpoint asks us to wait: a number, or a date (RFC 9110, 10.2.3); None for anything else."""
    text = (value or b"").decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        return max((moment - now).total_seconds(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
