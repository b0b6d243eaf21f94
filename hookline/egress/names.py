"""Look names up by the system's `getaddrinfo`, so that /etc/hosts, mDNS and search domains work as on the machine.

It cannot be cancelled: a thread that waits for a dead DNS server is gone for half a minute. So look-ups have threads of
their own; a look-up is given up after a while, and its thread written off. Names that resolved lately have threads
reserved, so that those which never answer cannot starve them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

LOOKUP_TIMEOUT = 5.0  # seconds, from the moment that a thread begins
QUEUED = 1.0  # seconds that a look-up waits for a thread before its callers go on without it
FRESH = 30.0  # seconds that addresses are kept
FAILED = 10.0  # seconds that a failure is kept
REMEMBERED = 3600.0  # seconds that a name counts as one that resolves
MAX_NAMES = 10_000  # that are remembered
THREADS = 32  # look-ups at a time, those that were given up aside
RESERVED = 16  # of these, for names that have resolved lately
MAX_THREADS = 256  # with those that were written off

Addresses = list[tuple[socket.AddressFamily, tuple[Any, ...]]]
GetAddrInfo = Callable[..., list[Any]]


class LookupFailed(Exception):
    """The name has no address, or nobody said so in time; the sentence goes into the log of attempts."""


@lru_cache(maxsize=10_000)
def literal(host: str) -> Addresses:
    """The address that this host is, in its usual spelling; empty for a name, and for odd spellings of an address."""
    try:
        family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    except ValueError:
        return []
    return [(family, (host, 0) if family == socket.AF_INET else (host, 0, 0, 0))]


class Busy(Exception):
    """No thread was free: this says nothing of the name."""


class Known(NamedTuple):
    """The addresses that a look-up found, or why it failed. Times are of time.monotonic()."""

    addresses: Addresses
    problem: str
    until: float
    resolved_at: float  # the last time that it did; 0 if never


class Lookup:
    """One look-up, for all who wait for it."""

    def __init__(self, host: str, resolves: bool, loop: asyncio.AbstractEventLoop) -> None:
        self.host, self.resolves = host, resolves  # has the name resolved lately?
        self.begun: asyncio.Future[None] = loop.create_future()  # by a thread of its own
        self.done: asyncio.Future[Known] = loop.create_future()


class Names:
    """Looks names up, on the running event loop."""

    def __init__(self, getaddrinfo: GetAddrInfo = socket.getaddrinfo) -> None:
        self._getaddrinfo = getaddrinfo
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._lookups: dict[str, Lookup] = {}
        self._waiting: dict[bool, deque[Lookup]] = {True: deque(), False: deque()}  # by whether the name resolves
        self._running = {True: 0, False: 0}
        self._threads = 0  # with those that were written off

    async def ready(self, host: str) -> float:
        """Wait for a thread, if this name must be looked up and none is free; returns for how many seconds.

        That is not the endpoint's time. Raises Busy after QUEUED seconds.
        """
        known = self._known.get(host)
        if literal(host) or (known is not None and known.until > time.monotonic()):
            return 0.0
        lookup = self._lookups.get(host) or self._enqueue(host, known)
        if lookup.begun.done():
            return 0.0
        began = time.monotonic()
        try:
            async with asyncio.timeout(QUEUED):
                await asyncio.shield(lookup.begun)
        except TimeoutError:
            raise Busy from None
        return time.monotonic() - began

    async def addresses(self, host: str) -> Addresses:
        """The addresses of this name; a numeric one, in any spelling, is its own. Raises LookupFailed."""
        if addresses := literal(host):
            return addresses
        known = self._known.get(host)
        if known is None or known.until <= time.monotonic():
            lookup = self._lookups.get(host) or self._enqueue(host, known)
            known = await asyncio.shield(lookup.done)
        if known.problem:
            raise LookupFailed(known.problem)
        return known.addresses

    def forget(self) -> None:
        """Keep no answer; what resolved lately is still known to have."""
        for host, known in self._known.items():
            self._known[host] = known._replace(until=0.0)

    def _enqueue(self, host: str, known: Known | None) -> Lookup:
        resolves = known is not None and 0 < known.resolved_at > time.monotonic() - REMEMBERED
        lookup = self._lookups[host] = Lookup(host, resolves, asyncio.get_running_loop())
        self._waiting[resolves].append(lookup)
        self._start_some()
        return lookup

    def _start_some(self) -> None:
        while self._threads < MAX_THREADS:
            if self._waiting[True] and sum(self._running.values()) < THREADS:
                self._start(self._waiting[True].popleft())
            elif self._waiting[False] and self._running[False] < THREADS - RESERVED:
                self._start(self._waiting[False].popleft())
            else:
                return

    def _start(self, lookup: Lookup) -> None:
        loop = lookup.done.get_loop()
        self._threads += 1
        self._running[lookup.resolves] += 1
        lookup.begun.set_result(None)

        def run() -> None:
            addresses, problem = self._look_up(lookup.host)
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(ended, addresses, problem)

        def ended(addresses: Addresses, problem: str) -> None:
            self._threads -= 1
            if not lookup.done.done():
                timer.cancel()
                self._settle(lookup, addresses, problem)
            elif addresses:
                self._remember(lookup.host, addresses, "")
            self._start_some()

        def give_up() -> None:
            self._settle(lookup, [], f"the DNS lookup timed out after {LOOKUP_TIMEOUT:g} s")
            self._start_some()

        timer = loop.call_later(LOOKUP_TIMEOUT, give_up)
        threading.Thread(target=run, name="hookline-dns", daemon=True).start()

    def _look_up(self, host: str) -> tuple[Addresses, str]:
        try:
            infos = self._getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, ValueError):
            return [], "DNS lookup failed"
        addresses = [(family, address) for family, _, _, _, address in infos]
        return addresses, "" if addresses else "DNS lookup failed"

    def _settle(self, lookup: Lookup, addresses: Addresses, problem: str) -> None:
        """Tell those who wait; the thread, if it goes on, is written off."""
        self._running[lookup.resolves] -= 1
        del self._lookups[lookup.host]
        lookup.done.set_result(self._remember(lookup.host, addresses, problem))

    def _remember(self, host: str, addresses: Addresses, problem: str) -> Known:
        now = time.monotonic()
        before = self._known.pop(host, None)
        resolved_at = now if addresses else before.resolved_at if before is not None else 0.0
        known = self._known[host] = Known(addresses, problem, now + (FAILED if problem else FRESH), resolved_at)
        if len(self._known) > MAX_NAMES:
            self._known.popitem(last=False)
        return known
