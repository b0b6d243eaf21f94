"""Heartbeats: each worker renews its row every few seconds, so that processes without one know that it runs."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from datetime import datetime, timedelta

from peewee import Database
from uuid_utils import uuid7

from hookline import clock
from hookline.errors import Unavailable
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import Heartbeat

log = logging.getLogger("hookline")

EVERY = 10.0  # seconds between beats
ALIVE = timedelta(seconds=30)  # since the last beat; also how far the clocks of two machines may differ
FORGOTTEN = timedelta(days=1)  # since the last beat of a worker that was killed
NONE_BEATS = "no worker beats: start one with  python manage.py worker , or set RUN_WORKER=true"


async def beat_forever(storage: Storage) -> None:
    """Beat until cancelled, then delete the row. The storage must outlive this."""
    worker_id, started_at = f"wrk_{uuid7()}", clock.now()
    try:
        while True:
            try:
                await storage.write(beat, worker_id, started_at)
            except Unavailable:  # the worker logs it
                pass
            except Exception:  # whatever it is, the next beat comes
                log.exception("the heartbeat could not be written")
            await asyncio.sleep(EVERY)
    finally:
        with suppress(Unavailable):
            await storage.write(leave, worker_id)


def beat(db: Database, worker_id: str, started_at: datetime) -> None:
    """Renew the row of this worker, and delete those that have long been silent. Raises Unavailable."""
    now = clock.now()
    row = {"worker_id": worker_id, "host": socket.gethostname(), "started_at": started_at, "beat_at": now}
    with transaction(db):
        insert = Heartbeat.insert(row).on_conflict(conflict_target=[Heartbeat.worker_id], preserve=[Heartbeat.beat_at])
        insert.execute(db)
        silent = (Heartbeat.beat_at < now - FORGOTTEN) | (Heartbeat.beat_at > now + FORGOTTEN)
        Heartbeat.delete().where(silent).execute(db)


def leave(db: Database, worker_id: str) -> None:
    """Delete the row of a worker. Raises Unavailable."""
    with transaction(db):
        Heartbeat.delete().where(Heartbeat.worker_id == worker_id).execute(db)


def problem(db: Database) -> str | None:
    """A sentence if no worker beats anywhere, else None. Raises Unavailable."""
    now = clock.now()
    alive = Heartbeat.select(Heartbeat.worker_id).where(Heartbeat.beat_at.between(now - ALIVE, now + ALIVE)).limit(1)
    with connected(db):
        return None if alive.scalar(db) is not None else NONE_BEATS
