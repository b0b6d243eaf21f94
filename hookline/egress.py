"""The one HTTP client that delivers, and its guard: it connects to public addresses and to those allowed, no others.

The check sits on the socket, right before it connects, so it sees literals in every spelling and each DNS answer as it
is used: there is no moment in between to swap it (DNS rebinding). `post` never raises for the peer's faults.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from hookline import clock
from hookline.policy import Result

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HOST = re.compile(r"(?i)https?://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/?#:]*)")
KEPT = 1024  # bytes of an answer

# What `ipaddress` calls global and yet leads back inside, or to no single host.
ALSO_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96",  # NAT64: an IPv4 address behind a gateway (RFC 6052)
        "64:ff9b:1::/48",
        "2002::/16",  # 6to4 (RFC 3056)
        "fec0::/10",  # site-local, deprecated (RFC 3879)
        "3fff::/20",  # documentation (RFC 9637)
        "5f00::/16",  # segment routing (RFC 9602)
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "168.63.129.16/32",  # a cloud's own services
    )
]


class Refused(OSError):
    """The guard does not let us connect there."""


def refusal(address: str, allowed: Sequence[Network]) -> str | None:
    """Why the guard refuses this address, in a sentence that names the setting; None if it lets it through."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    for face in faces(ip):
        if not is_public(face) and not any(face in network for network in allowed if network.version == face.version):
            return f"{face} is not a public address: to allow it, add its network to ALLOWED_NETWORKS"
    return None


def faces(ip: Address) -> list[Address]:
    """An address, and the IPv4 addresses that it stands for or leads to."""
    if isinstance(ip, ipaddress.IPv4Address):
        return [ip]
    if ip.ipv4_mapped is not None:
        return [ip.ipv4_mapped]
    found: list[Address] = [ip]
    if ip.sixtofour is not None:
        found.append(ip.sixtofour)
    if ip in ALSO_REFUSED[0]:
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return found


def is_public(ip: Address) -> bool:
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in ALSO_REFUSED)


def literal_refusal(url: str, allowed: Sequence[Network]) -> str | None:
    """The guard's opinion of a URL whose host is an address, or a name that always means this machine."""
    match = HOST.match(url)
    return literal_host_refusal(match[1].lower(), tuple(allowed)) if match else None


@lru_cache(maxsize=10_000)
def literal_host_refusal(host: str, allowed: tuple[Network, ...]) -> str | None:
    host = host.strip("[]").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        try:
            host = socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f.1, 2130706433
        except OSError:
            return None
    return refusal(host, allowed)


class Client:
    """Posts deliveries. `timeout`: seconds for everything up to the last byte read of the answer."""

    def __init__(
        self, *, allowed: Sequence[Network] = (), timeout: float = 15, resolver: AbstractResolver | None = None
    ) -> None:
        self.allowed = tuple(allowed)
        self.timeout = timeout
        self._resolver = resolver

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
        try:
            answer = await self._session.post(parsed(url), data=body, headers=headers, allow_redirects=False)
            try:
                kept = await self._beginning(answer)
            finally:
                answer.release()
            found: dict[str, Any] = {
                "status_code": answer.status,
                "response": kept.decode(errors="replace").replace("\0", "\ufffd"),
            }
            if answer.status >= 300:
                found["error"] = sentence_for_status(answer.status)
                found["retry_after"] = retry_after(answer.headers.get("Retry-After"), started_at)
        except Exception as exc:
            found = {"error": self._sentence_for(exc)}
        return Result(started_at, round((time.perf_counter() - start) * 1000), **found)

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
            raise Refused(reason)
        return socket.socket(family, kind, protocol)

    def _sentence_for(self, exc: Exception) -> str:
        """What went wrong, as recorded data. No text of the exception's own: it may hold the URL's password."""
        if isinstance(exc, TimeoutError | asyncio.TimeoutError):
            return f"timed out after {self.timeout:g} s"
        if isinstance(exc, aiohttp.ClientConnectorDNSError):
            return "DNS lookup failed"
        if isinstance(exc, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return "TLS failed: " + (tls_reason(exc) or "the certificate does not verify")
        if isinstance(exc, aiohttp.ClientConnectorError):
            return connect_reason(exc.os_error)
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
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    refused = [one for one in getattr(error, "exceptions", ()) if isinstance(one, Refused)]
    return str(refused[0]) if refused else f"cannot connect: {error.strerror or type(error).__name__}"


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
    except ValueError:
        return None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return max((moment - now).total_seconds(), 0.0)


@lru_cache(maxsize=10_000)
def parsed(url: str) -> URL:
    return URL(url)
