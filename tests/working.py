"""A worker that runs in this process, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network

from peewee import Database

from hookline.egress.client import Client
from hookline.policy import Rules
from hookline.store.open import storage_of
from hookline.worker.worker import Worker

LOOPBACK = [ip_network("127.0.0.0/8")]


@asynccontextmanager
async def working(db: Database, rules: Rules, client: Client | None = None) -> AsyncIterator[Worker]:
    """Delivers, to this machine too, until the block ends."""
    storage = storage_of(db)
    worker = Worker(storage, client or Client(allowed=LOOPBACK, timeout=rules.timeout), rules)
    await storage.start()
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()
        await storage.stop()
