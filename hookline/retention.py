"""Retention: an event that is old, and whose deliveries have all ended, is deleted with them and their attempts.

Old events are looked through in the order of time, a window at a time, and deleted in batches, each a short unit of
work. Each DELETE names the state that it expects: a delivery that becomes pending meanwhile (by a retry, a replay)
stays, and its event with it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from peewee import Database

from hookline import clock, history, steps
from hookline.errors import Unavailable
from hookline.history import Position
from hookline.store import locks, sql
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import stored_time

log = logging.getLogger("hookline")

WINDOW = 500  # events looked at in one go
BATCH = 500  # deliveries deleted in one unit of work
EVERY = 600.0  # seconds between passes
JUMP = 86400.0  # seconds that the clock may go forward between two passes; after a greater jump purges wait this long
FIRST = 60.0  # seconds until the first pass, at most, so that workers do not all begin at once

START: Position = (stored_time(datetime.fromisoformat("0001-01-02T00:00:00Z")), "")


class Batch(NamedTuple):
    """How much a unit of work has deleted. `done`: nothing is left of these events that may go."""

    events: int
    deliveries: int
    done: bool


def purge_all(db: Database, cutoff: datetime, progress: Callable[[int], None]) -> tuple[int, int]:
    """Purge on this thread, batch by batch; returns how many events and deliveries were deleted. Raises Unavailable.

    `progress` is called after each batch with the number of events so far.
    """
    return steps.run(db, _work(cutoff, progress))


async def purge_forever(storage: Storage, retention: float | None, every: float = EVERY, first: float = FIRST) -> None:
    """Every so many seconds purge what is older than `retention` seconds (None: nothing), until cancelled."""
    watch = Watch()
    await asyncio.sleep(random.uniform(0, first))
    while retention is not None:
        try:
            if watch.trusts_the_clock():
                cutoff = clock.now() - timedelta(seconds=retention)
                await steps.run_beside(storage, _work(cutoff, lambda events: None))
        except Unavailable as exc:
            log.warning("the purge goes on later: %s", exc)
        except Exception:  # whatever it is, the next pass comes
            log.exception("the purge failed")
        await asyncio.sleep(every)


def _work(cutoff: datetime, progress: Callable[[int], None]) -> steps.Work[tuple[int, int]]:
    events = deliveries = 0
    position: Position | None = START
    while position is not None:
        ids, position = yield steps.look(ended, cutoff, position)
        done = not ids
        while not done:
            batch: Batch = yield steps.write(purge, ids, cutoff)
            events, deliveries, done = events + batch.events, deliveries + batch.deliveries, batch.done
            progress(events)
    return events, deliveries


class Watch:
    """Notices that the clock jumps forward, after which what is recent looks old."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._until: float | None = None  # of time.monotonic(): until when the clock is not trusted

    def trusts_the_clock(self) -> bool:
        """False, with a warning, from a jump of more than a day on, for a day or until the clock is put right."""
        now = time.monotonic()
        jump = time.time() - now - self._offset
        if jump > JUMP:
            if self._until is None:
                self._until = now + JUMP
                log.warning(
                    "the clock went forward by %.1f days: nothing is purged for a day; if it is right now, "
                    "python manage.py purge does so at once",
                    jump / 86400,
                )
            if now < self._until:
                return False
        self._offset, self._until = self._offset + jump, None
        return True


def ended(db: Database, cutoff: datetime, after: Position = START) -> tuple[list[str], Position | None]:
    """The ids of those that may go, of the next WINDOW events behind `after`; and the position to go on from, if any.

    They were created before the cutoff, and all their deliveries ended before it. Raises Unavailable.
    """
    statement = f"""
        SELECT id FROM {sql.values(db, "event_ids", "id")} WHERE NOT EXISTS (
            SELECT 1 FROM deliveries d WHERE d.event_id = event_ids.id
            AND (d.status = 'pending' OR d.finished_at IS NULL OR d.finished_at >= {sql.time(db, "cutoff")}))"""
    with connected(db):
        old, following = history.window(db, after, cutoff, WINDOW)
        ids = sql.encoded_ids(event.event_id for event in old)
        rows = db.execute_sql(statement, {"event_ids": ids, "cutoff": stored_time(cutoff)}).fetchall()
    return [event_id for (event_id,) in rows], following


def purge(db: Database, event_ids: Sequence[str], cutoff: datetime) -> Batch:
    """Delete the next BATCH deliveries of these events, or, when none is left, the events. Raises Unavailable."""
    with transaction(db):
        deliveries = _delete_deliveries(db, event_ids, cutoff)
        if deliveries == BATCH:
            return Batch(0, deliveries, done=False)
        return Batch(_delete_events(db, event_ids), deliveries, done=True)


def _delete_deliveries(db: Database, event_ids: Sequence[str], cutoff: datetime) -> int:
    over = f"status <> 'pending' AND finished_at < {sql.time(db, 'cutoff')}"
    statement = f"""
        WITH batch AS MATERIALIZED (
            SELECT delivery_id FROM deliveries
            WHERE event_id IN (SELECT id FROM {sql.values(db, "event_ids", "id")}) AND {over}
            LIMIT {BATCH}{locks.skip_locked(db, "deliveries")})
        DELETE FROM deliveries WHERE delivery_id IN (SELECT delivery_id FROM batch) AND {over}
        RETURNING delivery_id"""  # sqlite3 has no row count for a WITH
    values = {"event_ids": sql.encoded_ids(event_ids), "cutoff": stored_time(cutoff)}
    return len(db.execute_sql(statement, values).fetchall())


def _delete_events(db: Database, event_ids: Sequence[str]) -> int:
    """Delete those without deliveries. They are locked first: a replay that is making one waits, and then fails."""
    of_these = f"event_id IN (SELECT id FROM {sql.values(db, 'event_ids', 'id')})"
    lock = f"SELECT event_id FROM events WHERE {of_these}{locks.skip_locked(db, 'events')}"
    rows = db.execute_sql(lock, {"event_ids": sql.encoded_ids(event_ids)}).fetchall()
    delete = f"""
        DELETE FROM events WHERE {of_these}
        AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.event_id = events.event_id)"""
    locked = sql.encoded_ids(event_id for (event_id,) in rows)
    return int(db.execute_sql(delete, {"event_ids": locked}).rowcount)


def count(db: Database, cutoff: datetime) -> tuple[int, int]:
    """How many events and deliveries a purge would delete. Raises Unavailable."""
    statement = f"""
        SELECT count(*) FROM deliveries WHERE event_id IN (SELECT id FROM {sql.values(db, "event_ids", "id")})"""
    events = deliveries = 0
    position: Position | None = START
    with connected(db):
        while position is not None:
            ids, position = ended(db, cutoff, position)
            events += len(ids)
            deliveries += int(db.execute_sql(statement, {"event_ids": sql.encoded_ids(ids)}).fetchone()[0])
    return events, deliveries
