"""A worker that runs in this process, for tests; claims without one; and waiting for what it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from peewee import Database

from hookline.egress import Client
from hookline.lanes import Slots
from hookline.policy import DEFAULT, Rules
from hookline.store.open import storage_of
from hookline.worker import claiming
from hookline.worker.jobs import Job
from hookline.worker.worker import Worker

LOOPBACK = [ip_network("127.0.0.0/8")]


def rules(**changes: Any) -> Rules:
    """The default rules with these changes."""
    return replace(DEFAULT, **changes)


@asynccontextmanager
async def working(db: Database, rules: Rules, client: Client | None = None) -> AsyncIterator[Worker]:
    """Deliver, to this machine too, until the block ends."""
    storage = storage_of(db)
    worker = Worker(storage, client or Client(allowed=LOOPBACK, timeout=rules.timeout), rules)
    await storage.start()
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
        await storage.stop()


def claim_up_to(db: Database, count: int) -> list[Job]:
    """Lease as a worker would that has so many free slots. Inside a unit of work."""
    return claiming.claim(db, Slots(count, count), DEFAULT.lease)


async def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for the first true value of a condition about rows that another thread or process writes; returns it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"not true within {seconds:g} s")
