"""TLS with real certificates, made here: what does not verify fails in words, and nothing is sent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any

import idna
import pytest
import trustme

from hookline.egress import client as egress_client
from hookline.egress.client import Client
from hookline.egress.names import Names
from hookline.policy import Result
from tests.egress.serving import serving as any_server

BODY = b"{}"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client's own context, with this authority beside the system's."""
    made = egress_client.tls_context

    def context() -> ssl.SSLContext:
        context = made()
        authority.configure_trust(context)
        return context

    monkeypatch.setattr(egress_client, "tls_context", context)
    yield


def to_loopback(host: str, port: None, type: int) -> list[Any]:
    return [(socket.AF_INET, type, 0, "", ("127.0.0.1", 0))]


@asynccontextmanager
async def serving(context: ssl.SSLContext | None, received: list[bytes]) -> AsyncIterator[int]:
    """A server that answers 200, or, without a context, says nothing at all."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if context is None:
            await reader.read()
        else:
            received.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with any_server(handle, context) as port:
        yield port


def serves(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def post(port: int, host: str = "hook.test", timeout: float = 5) -> Result:
    client = Client(allowed=[ip_network("127.0.0.0/8")], timeout=timeout, names=Names(to_loopback))
    await client.start()
    result = await client.post(f"https://{host}:{port}/", BODY, {})
    await client.close()
    return result


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("host", ["hook.test", "HOOK.test", "127.0.0.1", "p\u0159ijato.test"])
async def test_a_certificate_of_the_name_is_delivered_to(authority: trustme.CA, host: str) -> None:
    received: list[bytes] = []
    certificate = authority.issue_cert("hook.test", "127.0.0.1", idna.encode("p\u0159ijato.test").decode())
    async with serving(serves(certificate), received) as port:
        result = await post(port, host)
    assert (result.status_code, result.error) == (200, None)
    assert received[0].startswith(b"POST / HTTP/1.1\r\n")


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("names", "arguments", "error"),
    [
        (["hook.test"], {"not_before": LONG_AGO, "not_after": LONG_AGO.replace(year=2021)}, "certificate has expired"),
        (["other.test"], {}, "Hostname mismatch, certificate is not valid for 'hook.test'."),
        (["*.hook.test"], {}, "Hostname mismatch, certificate is not valid for 'hook.test'."),
    ],
    ids=["expired", "wrong name", "wild card"],
)
async def test_a_certificate_that_does_not_hold_fails(
    authority: trustme.CA, names: list[str], arguments: dict[str, Any], error: str
) -> None:
    received: list[bytes] = []
    async with serving(serves(authority.issue_cert(*names, **arguments)), received) as port:
        result = await post(port)
    assert (result.status_code, result.error) == (None, f"TLS failed: {error}")
    assert received == []


async def test_an_unknown_authority_fails(authority: trustme.CA) -> None:
    received: list[bytes] = []
    async with serving(serves(authority.issue_cert("hook.test")), received) as port:
        result = await post(port)
    assert result.status_code is None and (result.error or "").startswith("TLS failed: ")
    assert "certificate" in (result.error or "") and received == []


@pytest.mark.usefixtures("trusting")
async def test_tls_1_1_is_not_spoken(authority: trustme.CA) -> None:
    context = serves(authority.issue_cert("hook.test"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serving(context, []) as port:
        result = await post(port)
    assert result.status_code is None and (result.error or "").startswith("TLS failed: ")


async def test_a_handshake_that_never_ends_is_timed_out() -> None:
    async with serving(None, []) as port:
        assert (await post(port, timeout=0.3)).error == "timed out after 0.3 s"


async def test_a_server_that_does_not_speak_tls_fails() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with any_server(handle) as port:
        result = await post(port)
    assert result.status_code is None and (result.error or "").startswith("TLS failed: ")
