"""HTTP client that delivers, and its guard: it connects to public addresses and to those allowed, no others.

The guard checks each socket right before it connects. So it sees literals in every spelling, and each DNS answer as it
is used: no other answer can take its place in between (DNS rebinding). `post` never raises for the peer's faults.

An attempt records no address of a name that was refused: customers would learn the addresses behind the operator's
internal names. The operator's log has them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import time
import unicodedata
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from hookline import clock
from hookline.addresses import BAD_PORTS, Address, is_public, with_embedded
from hookline.errors import visible
from hookline.policy import Result

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Listening = tuple[str, int]  # host and port

HOST = re.compile(r"(?i)https?://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)(?::([0-9]{1,5})(?![^/?#]))?")
KEPT = 1024  # bytes of an answer
QUIET = 60.0  # seconds at least between two log lines about one host
MAX_QUIET = 1000  # hosts remembered for that
TO_ALLOW = "to allow it, add its network to ALLOWED_NETWORKS"
NAME_REFUSED = (
    "the endpoint's name resolves to something that is not a public address: to allow it, the operator adds its "
    "network to ALLOWED_NETWORKS"
)
OWN_REFUSED = "this service listens there: it does not deliver to itself"

log = logging.getLogger("hookline")


class Refused(OSError):
    """The guard does not let us connect to an address."""


def refusal(address: str, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses an address, in a sentence that names the setting; None if it lets it through."""
    for ip in with_embedded(ip_of(address)):
        if not is_public(ip) and not is_allowed(ip, allowed):
            return f"{ip} is not a public address: {TO_ALLOW}"
    return None


def port_refusal(address: str, port: int, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses a port that no endpoint has; None if the port or the address is allowed."""
    if port not in BAD_PORTS or all(is_allowed(ip, allowed) for ip in with_embedded(ip_of(address))):
        return None
    return port_sentence(port)


def port_sentence(port: int) -> str:
    return f"port {port} is blocked: to allow it, add the address's network to ALLOWED_NETWORKS"


def ip_of(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])


def is_allowed(ip: Address, allowed: Sequence[Network]) -> bool:
    return any(ip in network for network in allowed if network.version == ip.version)


def literal_refusal(url: str, allowed: Sequence[Network]) -> str | None:
    """Return why the guard refuses a URL whose host is an address, or a name that always means this machine.

    None if it lets it through, and for any other name: of these only the port can be judged before the look-up, and
    only if no network is allowed.
    """
    match = HOST.match(url)
    if match is None:
        return None
    host = unicodedata.normalize("NFKC", match[1]).replace("\u3002", ".")  # as names are read: full-width digits, dots
    return literal_host_refusal(host.lower(), int(match[2] or 80), tuple(allowed))


@lru_cache(maxsize=10_000)
def literal_host_refusal(host: str, port: int, allowed: tuple[Network, ...]) -> str | None:
    host = host.strip("[]").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    try:
        ip_of(host)
    except ValueError:
        try:
            host = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1, 2130706433
        except (OSError, ValueError):
            return port_sentence(port) if port in BAD_PORTS and not allowed else None
    return refusal(host, allowed) or port_refusal(host, port, allowed)


def leads_here(address: tuple[Any, ...], own: Listening | None) -> bool:
    """Tell whether a socket that connects to this address reaches the one on which this process listens."""
    if own is None or address[1] != own[1]:
        return False
    reached = with_embedded(ip_of(address[0]))
    if any(ip.is_loopback or ip.is_unspecified for ip in reached):
        return True
    try:
        bound = ip_of(own[0])
    except ValueError:  # a name: it may be any address of this machine
        bound = ipaddress.IPv4Address(0)
    if not bound.is_unspecified:
        return bound in reached
    return is_local(address[0]) or any(is_local(str(ip)) for ip in reached)


def is_local(address: str) -> bool:
    """Tell whether this is an address of this machine, by binding a socket to it."""
    try:
        infos = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, _, _, socket_address = infos[0]
        with socket.socket(family, kind) as probe:
            probe.bind(socket_address)
            return True
    except OSError:
        return False


class Guarded:
    """One call of `post`, and what the guard learns of it. Sockets are made in its context."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.refusal: str | None = None  # of one of the addresses at least; for the attempt log


attempt_of_context: ContextVar[Guarded] = ContextVar("attempt")


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
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.allowed = tuple(allowed)
        self.timeout = timeout
        self.own = own
        self._resolver = resolver
        self._warned: dict[str, float] = {}  # by host: when, of time.monotonic()

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=0,  # the worker's slots are the limit
            socket_factory=self._socket,
            resolver=self._resolver,
            ttl_dns_cache=10,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("Accept", "Accept-Encoding"),
        )

    async def close(self) -> None:
        await self._session.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Result:
        """One attempt."""
        started_at, start = clock.now(), time.perf_counter()
        attempt = Guarded(url)
        attempt_of_context.set(attempt)
        try:
            answer = await self._session.post(parsed(url), data=body, headers=headers, allow_redirects=False)
            try:
                kept = await self._beginning(answer)
            finally:
                answer.release()
            recorded_as: dict[str, Any] = {
                "status_code": answer.status,
                "response": kept.decode(errors="replace").replace("\0", "\ufffd"),
            }
            if answer.status >= 300:
                recorded_as["error"] = sentence_for_status(answer.status)
                recorded_as["retry_after"] = retry_after(answer.headers.get("Retry-After"), started_at)
        except Exception as exc:
            recorded_as = {"error": self._sentence_for(exc, attempt)}
        return Result(started_at, round((time.perf_counter() - start) * 1000), **recorded_as)

    async def _beginning(self, answer: aiohttp.ClientResponse) -> bytes:
        """The first KEPT bytes; a longer answer is not read on, and its connection not used again."""
        if (answer.content_length or KEPT + 1) <= KEPT:
            return await answer.read()
        kept = b""
        while len(kept) < KEPT:
            more = await answer.content.read(KEPT - len(kept))
            if not more:
                return kept
            kept += more
        if not answer.content.at_eof():
            answer.close()
        return kept

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, address = info
        if (reason := refusal(address[0], self.allowed)) is not None:
            attempt = attempt_of_context.get()
            self._refuse(attempt, reason, literal_refusal(attempt.url, self.allowed) or NAME_REFUSED)
        if (reason := port_refusal(address[0], address[1], self.allowed)) is not None:
            self._refuse(attempt_of_context.get(), reason, reason)
        if leads_here(address, self.own):
            self._refuse(attempt_of_context.get(), f"{address[0]}: {OWN_REFUSED}", OWN_REFUSED)
        return socket.socket(family, kind, protocol)

    def _refuse(self, attempt: Guarded, logged: str, recorded: str) -> NoReturn:
        host, now = parsed(attempt.url).host or "", time.monotonic()
        if now - self._warned.get(host, -QUIET) >= QUIET:
            if len(self._warned) >= MAX_QUIET:
                self._warned.clear()
            self._warned[host] = now
            log.warning("no delivery to %s: %s", visible(host), logged)
        attempt.refusal = recorded
        raise Refused(recorded)

    def _sentence_for(self, exc: Exception, attempt: Guarded) -> str:
        """Return what went wrong, as recorded data. No text of the exception's own: it may hold the URL's password."""
        if isinstance(exc, TimeoutError | asyncio.TimeoutError):
            return f"timed out after {self.timeout:g} s"
        if isinstance(exc, aiohttp.InvalidURL | aiohttp.ClientConnectorDNSError) and (
            literal := literal_refusal(attempt.url, self.allowed)
        ):
            return literal
        if isinstance(exc, aiohttp.ClientConnectorDNSError):
            return "DNS lookup failed"
        if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return "TLS failed: " + (tls_reason(exc) or "the certificate does not verify")
        if isinstance(exc, aiohttp.ClientConnectorError):
            return attempt.refusal or connect_reason(exc.os_error)
        for kind, sentence in SENTENCES.items():
            if isinstance(exc, kind):
                return sentence
        return f"the request failed: {type(exc).__name__}"


SENTENCES: dict[type[Exception], str] = {
    aiohttp.ServerDisconnectedError: "the endpoint closed the connection without an answer",
    aiohttp.ClientPayloadError: "the answer was cut off",
    aiohttp.ClientResponseError: "the answer is not HTTP",
    ConnectionResetError: "the endpoint reset the connection",
    aiohttp.ClientOSError: "the endpoint reset the connection",
    aiohttp.InvalidURL: "the URL cannot be used",
    ValueError: "the URL or a header cannot be used",
}


def connect_reason(error: OSError) -> str:
    """In the system's words: the exception's own name addresses."""
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return f"cannot connect: {os.strerror(error.errno)}" if error.errno else "cannot connect to any of its addresses"


def tls_reason(exc: Exception) -> str | None:
    inner = getattr(exc, "certificate_error", None) or getattr(exc, "os_error", None)
    return getattr(inner, "verify_message", None) or getattr(inner, "reason", None)


def sentence_for_status(status: int) -> str:
    return f"answered {status}" + (": redirects are not followed" if status < 400 else "")


def retry_after(text: str | None, now: datetime) -> float | None:
    """Seconds that an endpoint asks us to wait: a number, or a date (RFC 9110, 10.2.3); None for anything else."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return max((moment - now).total_seconds(), 0.0)


@lru_cache(maxsize=10_000)
def parsed(url: str) -> URL:
    return URL(url)
