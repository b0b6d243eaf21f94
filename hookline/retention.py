"""Retention: an event goes, with its deliveries and their attempts, when it is old and all of it has ended.

Old events are looked through in the order of time, a window at a time, and what has ended is deleted in batches, each
a short unit of work. Each DELETE names the state that it leaves: what is made pending meanwhile (a retry, a replay)
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

from hookline import clock
from hookline.errors import Unavailable
from hookline.store import locks, sql
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import read_time, stored_time

log = logging.getLogger("hookline")

WINDOW = 500  # events looked at in one go
BATCH = 500  # deliveries deleted in one unit of work
EVERY = 600.0  # seconds between passes
JUMP = 86400.0  # seconds that the clock may go forward between two passes; so long a purge waits after more than that
FIRST = 60.0  # seconds until the first one, at most, so that workers do not all begin at once

Place = tuple[str, str]  # the time and id of an event
START: Place = (stored_time(datetime.fromisoformat("0001-01-02T00:00:00Z")), "")


class Purged(NamedTuple):
    """What a batch has deleted. `done`: nothing is left of those events that may go."""

    events: int
    deliveries: int
    done: bool


async def purge_forever(storage: Storage, retention: float | None, every: float = EVERY, first: float = FIRST) -> None:
    """Purge what is older than `retention` seconds (None: nothing), again and again, until cancelled."""
    watch = Watch()
    await asyncio.sleep(random.uniform(0, first))
    while retention is not None:
        try:
            if watch.trusts_the_clock():
                await _pass(storage, clock.now() - timedelta(seconds=retention))
        except Unavailable as exc:
            log.warning("the purge goes on later: %s", exc)
        except Exception:  # whatever it is, the next pass comes
            log.exception("the purge failed")
        await asyncio.sleep(every)


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


async def _pass(storage: Storage, cutoff: datetime) -> None:
    after: Place | None = START
    loop = asyncio.get_running_loop()
    while after is not None:
        ids, after = await storage.scan(ended, cutoff, after)
        done = not ids
        while not done:
            began = loop.time()
            _, _, done = await storage.write(purge, ids, cutoff)
            await asyncio.sleep(loop.time() - began)  # as long as it took, for the writers


def ended(db: Database, cutoff: datetime, after: Place = START) -> tuple[list[str], Place | None]:
    """Of the next WINDOW events behind `after` the ids of those that may go; and the place to go on from, if any.

    They were created before the cutoff, and so did every delivery of theirs end. Raises Unavailable.
    """
    moment = sql.moment(db)
    window = f"""
        SELECT created_at, event_id FROM events
        WHERE (created_at, event_id) > ({moment}, {db.param}) AND created_at < {moment}
        ORDER BY created_at, event_id LIMIT {WINDOW}"""
    waits = f"""
        SELECT 1 FROM deliveries d
        WHERE d.event_id = given.id AND (d.status = 'pending' OR d.finished_at IS NULL OR d.finished_at >= {moment})"""
    choice = f"SELECT id FROM {sql.rows(db, 'id')} WHERE NOT EXISTS ({waits})"
    limit = stored_time(cutoff)
    with connected(db):
        found = db.execute_sql(window, (*after, limit)).fetchall()
        ids = [event_id for _, event_id in found]
        may_go = [row[0] for row in db.execute_sql(choice, (sql.ids(ids), limit)).fetchall()]
    last = read_time(found[-1][0]) if len(found) == WINDOW else None
    return may_go, None if last is None else (stored_time(last), ids[-1])


def purge(db: Database, event_ids: Sequence[str], cutoff: datetime) -> Purged:
    """Delete the next BATCH deliveries of these events, or, when none is left, the events. Raises Unavailable."""
    with transaction(db):
        deliveries = _delete_deliveries(db, event_ids, cutoff)
        if deliveries == BATCH:
            return Purged(0, deliveries, done=False)
        return Purged(_delete_events(db, event_ids), deliveries, done=True)


def _delete_deliveries(db: Database, event_ids: Sequence[str], cutoff: datetime) -> int:
    over = f"status <> 'pending' AND finished_at < {sql.moment(db)}"
    statement = f"""
        WITH batch AS MATERIALIZED (
            SELECT delivery_id FROM deliveries WHERE event_id IN (SELECT id FROM {sql.rows(db, "id")}) AND {over}
            LIMIT {BATCH}{locks.skip_locked(db, "deliveries")})
        DELETE FROM deliveries WHERE delivery_id IN (SELECT delivery_id FROM batch) AND {over}
        RETURNING delivery_id"""  # sqlite3 has no row count for a WITH
    limit = stored_time(cutoff)
    return len(db.execute_sql(statement, (sql.ids(event_ids), limit, limit)).fetchall())


def _delete_events(db: Database, event_ids: Sequence[str]) -> int:
    """Delete those without deliveries. They are locked first: a replay that is making one waits, and then fails."""
    free = f"SELECT event_id FROM events WHERE event_id IN (SELECT id FROM {sql.rows(db, 'id')})"
    locked = db.execute_sql(free + locks.skip_locked(db, "events"), (sql.ids(event_ids),)).fetchall()
    statement = f"""
        DELETE FROM events WHERE event_id IN (SELECT id FROM {sql.rows(db, "id")})
        AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.event_id = events.event_id)"""
    return int(db.execute_sql(statement, (sql.ids(event_id for (event_id,) in locked),)).rowcount)


def purge_all(db: Database, cutoff: datetime, progress: Callable[[int], None]) -> tuple[int, int]:
    """Purge in one go, batch by batch; returns how many events and deliveries went. Raises Unavailable."""
    events, deliveries = 0, 0
    place: Place | None = START
    while place is not None:
        ids, place = ended(db, cutoff, place)
        done = not ids
        while not done:
            batch = purge(db, ids, cutoff)
            events, deliveries, done = events + batch.events, deliveries + batch.deliveries, batch.done
            progress(events)
    return events, deliveries


def count(db: Database, cutoff: datetime) -> tuple[int, int]:
    """How many events and deliveries would go. Raises Unavailable."""
    events, deliveries = 0, 0
    place: Place | None = START
    statement = f"SELECT count(*) FROM deliveries WHERE event_id IN (SELECT id FROM {sql.rows(db, 'id')})"
    with connected(db):
        while place is not None:
            ids, place = ended(db, cutoff, place)
            events += len(ids)
            deliveries += int(db.execute_sql(statement, (sql.ids(ids),)).fetchone()[0])
    return events, deliveries
