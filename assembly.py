"""Assembly: the parts that the service (app.py) and the command line (manage.py) both build from the settings."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from peewee import Database

import models
import settings
from hookline.egress import Client
from hookline.logs import OneLine
from hookline.policy import Rules
from hookline.store import schema
from hookline.store.open import open_database, require_reachable
from hookline.store.storage import Storage
from hookline.worker.worker import Worker


def database_of(config: settings.Settings) -> Database:
    """Open the database of the settings, and bind the models to it.

    Raises Unavailable if it cannot be reached, Conflict if migrations are pending.
    """
    db = open_database(config.database_url, pool_size=config.database_pool)
    models.db.initialize(db)
    require_reachable(db)
    schema.require_current(db)
    return db


def worker_of(config: settings.Settings, storage: Storage) -> Worker:
    """Make a worker, not yet started."""
    rules = Rules(
        retry_schedule=config.retry_schedule,
        disable_after=config.disable_after,
        lease=config.lease,
        timeout=config.delivery_timeout,
        concurrency=config.worker_concurrency,
        retention=config.retention,
        max_payload=config.max_payload,
    )
    listening = (config.host, config.port)
    client = Client(allowed=config.allowed_networks, timeout=config.delivery_timeout, own=listening)
    return Worker(storage, client, rules)


@asynccontextmanager
async def running(storage: Storage, worker: Worker | None) -> AsyncIterator[None]:
    """Run the storage and the worker, if there is one. The worker stops first: it stores its last results."""
    await storage.start()
    if worker is not None:
        await worker.start()
    yield
    if worker is not None:
        await worker.stop()
    await storage.stop()


def quiet_gc() -> None:
    """Exempt all objects loaded by now from garbage collection: it would take a tenth of the time under load."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 50)


def start_logging(level: str) -> None:
    """Log to stderr: our own lines from `level` on, others' from warnings on. Peewee's debug lines hold secrets."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    logging.basicConfig(handlers=[handler])
    logging.getLogger("hookline").setLevel(level.upper())
