"""Locks: of rows on PostgreSQL, in the order below, and of a whole database on both.

THE LOCK ORDER. A transaction locks the rows of one kind in the order of their keys, and the kinds in this order:
webhooks, deliveries, lanes, events.

    who                                   locks, in this order
    ------------------------------------  ------------------------------------------------------------------------
    settling.settle                       webhooks, deliveries, lanes; then what publishing locks, if it disables one
    webhooks.change                       webhook, its deliveries (skips locked ones), its lane
    webhooks.unregister                   webhook, its deliveries; its lane by the cascade
    removal.delete_oldest                 webhook, its deliveries
    replays.record                        webhook, the replay, deliveries, lane
    imports.plan, imports.write           webhooks, lanes
    rotation.rotated, rotation.erase      webhooks (`erase` skips locked ones)
    deliveries.retry, deliveries.cancel   one delivery, its lane
    claiming.release                      deliveries, lanes
    clock_jumps.bring_forward             deliveries, lanes
    lanes.make_due                        lanes
    retention.purge                       deliveries, events (skips locked ones of both)
    events.publish                        webhooks (key share, by the foreign key), lanes of what it cannot lease
    claiming.claim                        lanes, their deliveries: against the order

The deviation is safe: `claim` must begin with the lanes, but skips those that are locked, and skips locked
deliveries, so it waits for nobody while it holds a lock. If all due lanes are locked it waits for a single one, holding
nothing else. A caller's own transaction opens its lanes after its commit (lanes.open_lanes).

`webhooks` are locked FOR NO KEY UPDATE, which does not conflict with the key share of a foreign key: publishing waits
for no settlement. Only deleting a webhook makes it wait.

Isolation is READ COMMITTED (pool.SESSION): a statement that waited for a row sees it as the other transaction left it,
so every change names the state that it leaves (WHERE status = 'pending' ...). With REPEATABLE READ it would fail
instead. A deadlock that is left, such as of a caller's own statements, is TRANSIENT: postgres.write_now tries again.

SQLite has one writer at a time (BEGIN IMMEDIATE), so nobody there locks rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peewee import Database

from hookline.errors import Conflict
from hookline.store import sql
from hookline.store.failures import FAILURES
from hookline.store.pool import SESSION, is_postgres

log = logging.getLogger("hookline")

SHORT_LOCK_TIMEOUT = 500  # ms: ordinary units of work hold their locks for a few


def lock_webhooks(db: Database, webhook_ids: Collection[str], *, skip_blocked: bool = False) -> set[str]:
    """Lock the rows of these webhooks in the order of their ids; does nothing on SQLite.

    With `skip_blocked` rows that other transactions have locked are left alone, and their ids are returned.
    """
    if not is_postgres(db):
        return set()
    select = f"SELECT webhook_id FROM webhooks WHERE webhook_id IN (SELECT id FROM {sql.values(db, 'ids', 'id')})"
    lock = f"{select} ORDER BY webhook_id FOR NO KEY UPDATE{' SKIP LOCKED' if skip_blocked else ''}"
    rows = db.execute_sql(lock, {"ids": sql.encoded_ids(webhook_ids)}).fetchall()
    locked = {webhook_id for (webhook_id,) in rows}
    if not skip_blocked or len(locked) == len(webhook_ids):
        return set()
    rows = db.execute_sql(select, {"ids": sql.encoded_ids(set(webhook_ids) - locked)}).fetchall()
    return {webhook_id for (webhook_id,) in rows}  # those that were deleted are not blocked


def limit_lock_waits(db: Database) -> None:
    """Limit lock waits to 500 ms for the rest of the transaction, which then fails with LOCKED. PostgreSQL only."""
    if is_postgres(db):
        db.execute_sql(f"SET LOCAL lock_timeout = {SHORT_LOCK_TIMEOUT}")


def for_update(db: Database, table: str) -> str:
    """The clause that locks the rows of this table or alias, waiting for locked ones; '' on SQLite."""
    return f" FOR UPDATE OF {table}" if is_postgres(db) else ""


def skip_locked(db: Database, table: str) -> str:
    """The clause that locks the rows of this table or alias and leaves out locked ones; '' on SQLite."""
    return f"{for_update(db, table)} SKIP LOCKED" if is_postgres(db) else ""


@contextmanager
def exclusive(db: Database, lock: int, busy: str = "") -> Iterator[None]:
    """Hold a database-wide lock; if it is taken, log and wait, or raise Conflict with the sentence `busy`.

    `lock` is the number of an advisory lock of PostgreSQL. With SQLite the folder of the file is locked, so that no
    lock file is left behind.
    """
    take, give_back = _advisory_lock(db, lock) if is_postgres(db) else _folder_lock(db)
    if not take(False):
        if busy:
            raise Conflict(busy)
        log.warning("waiting for another process that works on this database")
        take(True)
    try:
        yield
    finally:
        give_back()


def _advisory_lock(db: Database, lock: int) -> tuple[Callable[[bool], bool], Callable[[], None]]:
    def take(wait: bool) -> bool:
        if not wait:
            return bool(db.execute_sql("SELECT pg_try_advisory_lock(%(lock)s)", {"lock": lock}).fetchone()[0])
        db.execute_sql("SELECT set_config('lock_timeout', '0', false)")
        db.execute_sql("SELECT pg_advisory_lock(%(lock)s)", {"lock": lock})
        db.execute_sql("SELECT set_config('lock_timeout', %(timeout)s, false)", {"timeout": SESSION["lock_timeout"]})
        return True

    def give_back() -> None:
        with suppress(*FAILURES):  # if the connection was lost, the server has released the lock
            db.execute_sql("SELECT pg_advisory_unlock(%(lock)s)", {"lock": lock})

    return take, give_back


def _folder_lock(db: Database) -> tuple[Callable[[bool], bool], Callable[[], None]]:
    try:
        import fcntl
    except ImportError:  # Windows: two migrations at once fail with an error, and harm nothing
        return lambda wait: True, lambda: None
    folder = os.open(Path(db.database).resolve().parent, os.O_RDONLY)

    def take(wait: bool) -> bool:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    return take, lambda: os.close(folder)
