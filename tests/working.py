"""For tests: a worker that runs in this process, claims without one, answers for it, and waiting for what it does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from typing import Any, TypeVar

from peewee import Database

from hookline import deliveries
from hookline.egress.client import Client
from hookline.lanes import Slots
from hookline.policy import DEFAULT, Rules
from hookline.store.open import storage_of
from hookline.worker import claiming
from hookline.worker.jobs import Job
from hookline.worker.worker import Worker
from tests.receiver import Answer, Received

T = TypeVar("T")
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


async def until(condition: Callable[[], T | None], seconds: float = 20) -> T:
    """Wait for the first true value of a condition about rows that another thread or process writes; returns it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        await asyncio.sleep(0.01)
    raise AssertionError(f"not true within {seconds:g} s")


def wait_until(condition: Callable[[], T | None], seconds: float = 60) -> T:
    """Like `until`, for tests and threads without an event loop."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not true within {seconds:g} s")


def ended(db: Database, count: int = 1) -> Callable[[], list[dict[str, Any]] | None]:
    """A condition that is true when this many deliveries have ended; its value is their rows."""

    def look() -> list[dict[str, Any]] | None:
        rows = deliveries.page(db, limit=200)
        has_ended = len(rows) >= count and all(row["status"] != "pending" for row in rows)
        return rows if has_ended else None

    return look


def answering(*answers: int | Answer) -> Callable[[Received], Answer]:
    """These answers one after the other, then the last one again."""
    left = [(answer, {}, b"said") if isinstance(answer, int) else answer for answer in answers]
    lock = threading.Lock()

    def next_answer(_: Received) -> Answer:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return next_answer
