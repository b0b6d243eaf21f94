"""Connections of the client: kept, closed, retried once, raced; against real servers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest

from hookline.egress import client as egress_client
from hookline.egress.client import Client, in_turns
from hookline.egress.connection import NO_ANSWER
from hookline.egress.names import Names
from tests.egress.serving import serving

BODY = b'{"n": 1}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Endpoint:
    """Answers every request on a connection in turn; counts connections and requests."""

    def __init__(self, answer: bytes = OK, requests_per_connection: int = 1000) -> None:
        self.answer, self.requests_per_connection = answer, requests_per_connection
        self.connections = self.requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        for _ in range(self.requests_per_connection):
            try:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(BODY))
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            self.requests += 1
            writer.write(self.answer)
        writer.close()


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[Client]:
    client = Client(**{"allowed": [ip_network("127.0.0.0/8"), ip_network("::1/128")], "timeout": 5, **options})
    await client.start()
    yield client
    await client.close()


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (OK, 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 1),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 3),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 3),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 2000, 3),  # not read to its end
        (OK + b"more", 3),
    ],
)
async def test_a_connection_is_kept_if_its_answer_was_read_to_the_end(answer: bytes, connections: int) -> None:
    endpoint = Endpoint(answer)
    async with serving(endpoint) as port, started() as client:
        for _ in range(3):
            assert (await client.post(f"http://127.0.0.1:{port}/", BODY, {})).status_code
    assert (endpoint.requests, endpoint.connections) == (3, connections)


async def test_a_kept_connection_that_the_endpoint_closed_is_replaced_in_silence() -> None:
    endpoint = Endpoint(requests_per_connection=1)
    async with serving(endpoint) as port, started() as client:
        for _ in range(5):
            result = await client.post(f"http://127.0.0.1:{port}/", BODY, {})
            assert (result.status_code, result.error) == (200, None)
    assert (endpoint.requests, endpoint.connections) == (5, 5)


async def test_a_new_connection_that_closes_without_an_answer_fails_at_once() -> None:
    endpoint = Endpoint(requests_per_connection=0)
    async with serving(endpoint) as port, started() as client:
        assert (await client.post(f"http://127.0.0.1:{port}/", BODY, {})).error == NO_ANSWER
    assert endpoint.connections == 1


async def test_connections_that_nobody_uses_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_client, "IDLE_TIMEOUT", 0.1)
    ended = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Endpoint(requests_per_connection=1000)(reader, writer)
        ended.set()

    async with serving(handle) as port, started() as client:
        await client.post(f"http://127.0.0.1:{port}/", BODY, {})
        async with asyncio.timeout(20):
            await ended.wait()


async def test_so_many_connections_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_client, "MAX_IDLE_PER_ORIGIN", 3)
    endpoint = Endpoint()
    async with serving(endpoint) as port, started() as client:
        for _ in range(2):
            await asyncio.gather(*(client.post(f"http://127.0.0.1:{port}/", BODY, {}) for _ in range(10)))
    assert (endpoint.requests, endpoint.connections) == (20, 17)


async def test_an_answer_before_the_body_was_sent_counts_and_the_connection_is_not_kept() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await reader.read(100)

    async with serving(handle) as port, started() as client:
        for _ in range(2):
            result = await client.post(f"http://127.0.0.1:{port}/", b"x" * 20_000_000, {})
            assert result.status_code == 413
    assert connections == 2


def test_addresses_take_turns_by_family() -> None:
    four, six = socket.AF_INET, socket.AF_INET6
    addresses = [(six, ("a",)), (six, ("b",)), (six, ("c",)), (four, ("d",))]
    assert [address for _, (address,) in in_turns(addresses)] == ["a", "d", "b", "c"]


async def test_an_address_that_does_not_answer_holds_up_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress_client, "STAGGER", 0.05)
    silent = socket.socket()  # its queue of one is full: whoever else connects gets no answer
    silent.bind(("127.0.0.2", 0))
    silent.listen(0)
    port = silent.getsockname()[1]
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.2", port))

    def both(host: str, wanted: None, type: int) -> list[Any]:
        return [(socket.AF_INET, type, 0, "", (address, 0)) for address in ("127.0.0.2", "127.0.0.1")]

    server = await asyncio.start_server(Endpoint(), "127.0.0.1", port)
    async with started(names=Names(both)) as client:
        result = await client.post(f"http://both.test:{port}/", BODY, {})
    server.close()
    for each in (silent, *fillers):
        each.close()
    assert (result.status_code, result.error) == (200, None)


async def test_a_head_that_a_url_or_a_header_would_split_is_not_sent() -> None:
    endpoint = Endpoint()
    async with serving(endpoint) as port, started() as client:
        for path, headers in (("a\r\nX: y", {}), ("a b", {}), ("\u2603?q=\u2603", {}), ("", {"X": "a\nb"})):
            result = await client.post(f"http://127.0.0.1:{port}/{path}", BODY, headers)
            assert (result.status_code == 200) is (path in ("a b", "\u2603?q=\u2603"))
    assert endpoint.requests == 2
