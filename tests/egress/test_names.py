"""Look-ups beside names that never answer: real threads that hang, as in `getaddrinfo` with a dead DNS server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from hookline.egress import names
from hookline.egress.names import Busy, LookupFailed, Names

ADDRESS = (socket.AF_INET, ("192.0.2.1", 0))


class Dns:
    """A `getaddrinfo` whose names that begin with `dead` do not answer until the test ends."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.ended = threading.Event()

    def __call__(self, host: str, port: None, type: int) -> list[Any]:
        self.asked[host] += 1
        if host.startswith("dead"):
            self.ended.wait(30)
        if host.startswith(("dead", "unknown")):
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(ADDRESS[0], type, 0, "", ADDRESS[1])]


@pytest.fixture
def dns() -> Iterator[Dns]:
    served = Dns()
    yield served
    served.ended.set()


async def test_a_name_is_looked_up_once_however_many_ask(dns: Dns) -> None:
    looked_up = Names(dns)
    assert await asyncio.gather(*(looked_up.addresses("a.test") for _ in range(50))) == [[ADDRESS]] * 50
    assert await looked_up.addresses("a.test") == [ADDRESS]
    assert dns.asked["a.test"] == 1
    looked_up.forget()
    await looked_up.addresses("a.test")
    assert dns.asked["a.test"] == 2


async def test_a_failure_is_kept_for_a_while_too(dns: Dns) -> None:
    looked_up = Names(dns)
    for _ in range(3):
        with pytest.raises(LookupFailed, match="DNS lookup failed"):
            await looked_up.addresses("unknown.test")
    assert dns.asked["unknown.test"] == 1


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1"])
async def test_an_address_is_not_looked_up(dns: Dns, address: str) -> None:
    ((_, found),) = await Names(dns).addresses(address)
    assert found[0] == address and not dns.asked


async def test_a_name_that_does_not_answer_is_given_up(dns: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT", 0.05)
    with pytest.raises(LookupFailed, match="timed out"):
        await Names(dns).addresses("dead.test")


async def test_names_that_never_answer_do_not_starve_those_that_have_resolved(dns: Dns) -> None:
    looked_up = Names(dns)
    await looked_up.addresses("a.test")
    looked_up.forget()
    dead = [asyncio.ensure_future(looked_up.addresses(f"dead{number}.test")) for number in range(300)]
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        assert await looked_up.addresses("a.test") == [ADDRESS]
    assert len([name for name in dns.asked if name.startswith("dead")]) <= names.THREADS
    for lookup in dead:
        lookup.cancel()


async def test_who_waits_in_vain_for_a_thread_is_told_so(dns: Dns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "QUEUED", 0.05)
    looked_up = Names(dns)
    dead = [asyncio.ensure_future(looked_up.addresses(f"dead{number}.test")) for number in range(names.THREADS)]
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await looked_up.ready("new.test")
    assert not dns.asked["new.test"]
    for lookup in dead:
        lookup.cancel()


async def test_threads_of_names_that_were_given_up_make_room_up_to_a_bound(
    dns: Dns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT", 0.02)
    monkeypatch.setattr(names, "MAX_THREADS", 40)
    looked_up = Names(dns)
    dead = [asyncio.ensure_future(looked_up.addresses(f"dead{number}.test")) for number in range(100)]
    async with asyncio.timeout(20):
        await asyncio.gather(*dead[:40], return_exceptions=True)
        assert sum(dns.asked.values()) == 40
        dns.ended.set()
        await asyncio.gather(*dead, return_exceptions=True)
    assert sum(dns.asked.values()) == 100
