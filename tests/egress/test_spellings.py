"""Spellings of addresses that are not public, as a customer may write them into a URL: none of them connects.

The client is the real one, and nothing is replaced: names are answered as the worst DNS server would, with loopback.
Python's own audit events say whether any socket was told to connect. Nothing here leaves the machine.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import ip_network
from typing import Any

import pytest

from hookline.egress.client import Client
from hookline.egress.guard import NAME_REFUSED, OWN_REFUSED, leads_here
from hookline.egress.names import Names
from hookline.policy import Result
from tests.conftest import DATA


def table() -> dict[str, list[str]]:
    """By group. Most are in a file, because they look like each other to a reader and to a linter."""
    groups: dict[str, list[str]] = {}
    for line in (DATA / "spellings.txt").read_text().splitlines()[1:]:
        if line.startswith("# "):
            groups[line[2:]] = []
        elif line:
            groups[list(groups)[-1]] += line.split()
    return groups | {"with invisible characters": INVISIBLE}


INVISIBLE = [
    " 127.0.0.1",
    "127.0.0.1 ",
    "127.0.0.1\t",
    "127.0.0.1\r\n",
    "127.\t0.0.1",
    "127.0.\n0.1",
    "8.8.8.8 127.0.0.1",
    "127.0.0.1\0",
    "127.0.0.1\0.test",
    "\u200b127.0.0.1",
    "127.0.0.1\u200b",
    "loc\u00adalhost",
    "loc\u200dalhost",
    "127\u2024 0.0.1",
    "127\u20240.0.1",
    "\ufeff127.0.0.1",
    "127.0.0.1\u00a0",
    "127.0.0.1\u3000",
    "\u202e1.0.0.721",
]
TABLE = table()
FULL_WIDTH = "\uff11\uff12\uff17.0.0.1"
REFUSALS = ("ALLOWED_NETWORKS", "the URL cannot be used", "the URL or a header cannot be used")

connects: list[Any] | None = None  # the addresses that sockets were told to connect to


def record(event: str, arguments: tuple[Any, ...]) -> None:
    if connects is not None and event in ("socket.connect", "socket.getaddrinfo"):
        connects.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(record)  # it stays: there is no way to remove one


@contextmanager
def recorded_connects() -> Iterator[list[Any]]:
    global connects
    found: list[Any] = []
    connects = found
    try:
        yield found
    finally:
        connects = None


def leads_inside(*addresses: str) -> Names:
    """A DNS server in an attacker's hands: any name is an address of ours."""

    def getaddrinfo(host: str, port: None, type: int) -> list[Any]:
        return [
            (socket.AF_INET6, type, 0, "", (address, 0, 0, 0))
            if ":" in address
            else (socket.AF_INET, type, 0, "", (address, 0))
            for address in addresses
        ]

    return Names(getaddrinfo)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[str]]]:
    """One port of 127.0.0.1 and ::1, and a list that gets the address of whoever connects."""
    callers: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append(writer.get_extra_info("peername")[0])
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        writer.close()

    hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    server = await asyncio.start_server(answer, hosts[0], 0)
    port = server.sockets[0].getsockname()[1]
    others = [await asyncio.start_server(answer, host, port) for host in hosts[1:]]
    yield port, callers
    for one in (server, *others):
        one.close()
        await one.wait_closed()


@asynccontextmanager
async def started(client: Client) -> AsyncIterator[Client]:
    await client.start()
    yield client
    await client.close()


async def outcomes(client: Client, hosts: list[str], port: int, scheme: str) -> dict[str, Result]:
    return {host: await client.post(f"{scheme}://{host}:{port}/hook", b"{}", {}) for host in hosts}


def test_there_are_more_than_260_spellings() -> None:
    every = [host for group in TABLE.values() for host in group]
    assert len(set(every)) == len(every) > 400


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("group", TABLE)
async def test_no_spelling_of_an_address_inside_connects(group: str, scheme: str) -> None:
    async with (
        listening() as (port, callers),
        started(Client(timeout=5, names=leads_inside("127.0.0.1", "::1"))) as client,
    ):
        with recorded_connects() as found:
            results = await outcomes(client, TABLE[group], port, scheme)
    assert found == []
    assert callers == []
    assert {host: result.status_code for host, result in results.items() if result.status_code} == {}
    unclear = {
        host: result.error for host, result in results.items() if not any(x in (result.error or "") for x in REFUSALS)
    }
    assert unclear == {}


async def test_the_same_client_connects_where_it_is_allowed_to() -> None:
    """The proof above sees a connection where there is one."""
    allowed = [ip_network("127.0.0.0/8"), ip_network("::1/128")]
    hosts = ["127.0.0.1", "[::ffff:127.0.0.1]", "0x7f.1", FULL_WIDTH, "rebound.test", "user@127.0.0.1"]
    async with (
        listening() as (port, callers),
        started(Client(allowed=allowed, timeout=5, names=leads_inside("127.0.0.1"))) as client,
    ):
        with recorded_connects() as found:
            results = await outcomes(client, hosts, port, "http")
    assert {host: result.status_code for host, result in results.items()} == dict.fromkeys(hosts, 204)
    assert len(found) == len(callers) == len(hosts)


ADDRESSES = sorted({host.strip("[]") for host in TABLE["inside"] if host.startswith("[") and "%25" not in host})
ADDRESSES += ["127.0.0.1", "0.0.0.0", "10.0.0.1", "100.64.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.192"]
ADDRESSES += ["192.168.0.1", "168.63.129.16", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1"]


@pytest.mark.parametrize("beside", [(), ("::1",)], ids=["alone", "beside another"])
async def test_what_a_customer_sees_of_a_refused_name_has_no_address(
    beside: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for address in ADDRESSES:
        async with started(Client(timeout=5, names=leads_inside(address, *beside))) as client:
            with recorded_connects() as found:
                result = await client.post("http://user:hush@db.internal.test/", b"{}", {})
        assert (result.status_code, result.error, found) == (None, NAME_REFUSED, [])
        assert "not a public address" in NAME_REFUSED and "ALLOWED_NETWORKS" in NAME_REFUSED
    assert len(caplog.messages) == len(ADDRESSES)  # of as many clients
    assert all(line.startswith("no delivery to db.internal.test: ") for line in caplog.messages)
    assert "169.254.169.254 is not a public address" in caplog.text
    assert "hush" not in caplog.text


async def test_a_name_with_a_private_and_a_dead_address_tells_neither() -> None:
    allowed = [ip_network("127.0.0.1/32")]
    async with (
        listening() as (port, _),
        started(Client(allowed=allowed, timeout=5, names=leads_inside("10.0.0.1", "127.0.0.1"))) as client,
    ):
        assert (await client.post(f"http://mixed.test:{port}/", b"{}", {})).status_code == 204
    async with started(Client(allowed=allowed, timeout=5, names=leads_inside("10.0.0.1", "127.0.0.1"))) as client:
        assert (await client.post(f"http://mixed.test:{port}/", b"{}", {})).error == NAME_REFUSED


async def test_the_operators_log_has_one_line_a_minute_for_each_host(caplog: pytest.LogCaptureFixture) -> None:
    async with started(Client(timeout=5, names=leads_inside("10.0.0.7"))) as client:
        for _ in range(20):
            await client.post("http://one.test/", b"{}", {})
            await client.post("http://two.test/x", b"{}", {})
            await client.post("http://10.0.0.8/", b"{}", {})
        client._warned["one.test"] -= 60
        await client.post("http://one.test/", b"{}", {})
    sentence = "is not a public address: to allow it, add its network to ALLOWED_NETWORKS"
    first, second = f"no delivery to one.test: 10.0.0.7 {sentence}", f"no delivery to two.test: 10.0.0.7 {sentence}"
    assert caplog.messages == [first, second, f"no delivery to 10.0.0.8: 10.0.0.8 {sentence}", first]
    assert {record.name for record in caplog.records} == {"hookline"}


async def test_a_bad_port_is_refused_before_anything_connects() -> None:
    blocked = "port 6667 is blocked: to allow it, add the address's network to ALLOWED_NETWORKS"
    async with started(Client(timeout=5, names=leads_inside("8.8.8.8"))) as client:
        with recorded_connects() as found:
            assert (await client.post("http://irc.test:6667/", b"{}", {})).error == blocked
            assert (await client.post("http://8.8.8.8:6667/", b"{}", {})).error == blocked
    assert found == []
    async with started(Client(allowed=[ip_network("127.0.0.0/8")], timeout=5)) as client:
        assert (await client.post("http://127.0.0.1:6667/", b"{}", {})).error == "connection refused"


# The service itself

EVERYTHING = [ip_network("0.0.0.0/0"), ip_network("::/0")]
ITSELF = ["127.0.0.1", "127.0.0.2", "127.1.2.3", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:0.0.0.0]"]
ITSELF += ["0x7f.1", "[::127.0.0.1]", FULL_WIDTH, "hooks.test", "localhost", "user@127.0.0.1"]


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "::", "::1", "localhost"])
async def test_the_client_never_connects_to_the_port_that_its_own_process_listens_on(bound: str) -> None:
    async with listening() as (port, callers), listening() as (another, _):
        client = Client(allowed=EVERYTHING, timeout=5, own=(bound, port), names=leads_inside("127.0.0.1", "::1"))
        async with started(client):
            with recorded_connects() as found:
                results = await outcomes(client, ITSELF, port, "http")
            assert {result.error for result in results.values()} == {OWN_REFUSED}
            assert (found, callers) == ([], [])
            assert (await client.post(f"http://127.0.0.1:{another}/", b"{}", {})).status_code == 204


def addresses_of_this_machine() -> list[tuple[Any, ...]]:
    """Those of loopback, and those that it would send from: connecting a UDP socket sends nothing."""
    found: list[tuple[Any, ...]] = [("127.0.0.1", 8005), ("127.0.0.2", 8005), ("::1", 8005, 0, 0)]
    for family, elsewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((elsewhere, 9))
            own = probe.getsockname()[0]
            found.append((own, 8005) if family == socket.AF_INET else (own, 8005, 0, 0))
    return found


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "my-machine.test"])
def test_bound_to_every_address_each_one_of_the_machine_is_the_service_itself(bound: str) -> None:
    for address in addresses_of_this_machine():
        assert leads_here(address, (bound, 8005)), address
        assert not leads_here((address[0], 8006, *address[2:]), (bound, 8005))
    assert not leads_here(("8.8.8.8", 8005), (bound, 8005))
    assert not leads_here(("2606:4700::1111", 8005, 0, 0), (bound, 8005))


def test_bound_to_one_address_the_others_of_the_machine_are_somebody_elses() -> None:
    own = ("192.0.2.1", 8005)
    assert leads_here(("192.0.2.1", 8005), own)
    assert leads_here(("::ffff:192.0.2.1", 8005, 0, 0), own)
    assert leads_here(("127.0.0.1", 8005), own)
    for address in addresses_of_this_machine():
        if not address[0].startswith("127.") and address[0] != "::1":
            assert not leads_here(address, own)
    assert not leads_here(("192.0.2.1", 8005), None)
