"""Locks: of rows, in one order, and of a whole database."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peewee import (
    Database,
)

from hookline.errors import Conflict
from hookline.store.failures import FAILURES
from hookline.store.pool import SESSION, is_postgres
from hookline.store.sql import ids, rows

log = logging.getLogger("hookline")

BRIEFLY = 500  # ms: others hold what they lock for a few


def lock_webhooks(db: Database, values: Collection[str], *, skip_blocked: bool = False) -> set[str]:
    """Lock these webhooks before what hangs on them, and in one order, so that no two transactions wait for each other.

    A webhook's row comes first, as in its deletion, then its deliveries, then its lane. If only the `free` ones are
    wanted, those that others hold are left alone and returned. SQLite has one writer.
    """
    if not is_postgres(db):
        return set()
    select = f"SELECT webhook_id FROM webhooks WHERE webhook_id IN (SELECT id FROM {rows(db, 'id')})"
    lock = f"{select} ORDER BY webhook_id FOR NO KEY UPDATE{' SKIP LOCKED' if skip_blocked else ''}"
    locked = {webhook_id for (webhook_id,) in db.execute_sql(lock, (ids(values),)).fetchall()}
    if not skip_blocked or len(locked) == len(values):
        return set()
    return {webhook_id for (webhook_id,) in db.execute_sql(select, (ids(set(values) - locked),)).fetchall()}


def limit_lock_waits(db: Database) -> None:
    """For the rest of this transaction: rather fail (LOCKED) than wait long for what somebody holds on to."""
    if is_postgres(db):
        db.execute_sql(f"SET LOCAL lock_timeout = {BRIEFLY}")


def for_update(db: Database, table: str) -> str:
    """Lock the rows; wait for those that others hold. SQLite has one writer, so there are none."""
    return f" FOR UPDATE OF {table}" if is_postgres(db) else ""


def skip_locked(db: Database, table: str) -> str:
    """Lock the rows; leave to others those that they hold."""
    return f"{for_update(db, table)} SKIP LOCKED" if is_postgres(db) else ""


@contextmanager
def exclusive(db: Database, lock: int, busy: str = "") -> Iterator[None]:
    """One process at a time, on one database: others wait, and say so, or raise Conflict if `busy` has a sentence.

    `lock` is the number of an advisory lock of PostgreSQL. SQLite's lock is on the folder: no lock file is left behind.
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
            return bool(db.execute_sql("SELECT pg_try_advisory_lock(%s)", (lock,)).fetchone()[0])
        db.execute_sql("SELECT set_config('lock_timeout', '0', false)")
        db.execute_sql("SELECT pg_advisory_lock(%s)", (lock,))
        db.execute_sql("SELECT set_config('lock_timeout', %s, false)", (SESSION["lock_timeout"],))
        return True

    def give_back() -> None:
        with suppress(*FAILURES):  # a connection that was lost has given it back
            db.execute_sql("SELECT pg_advisory_unlock(%s)", (lock,))

    return take, give_back


def _folder_lock(db: Database) -> tuple[Callable[[bool], bool], Callable[[], None]]:
    try:
        import fcntl
    except ImportError:  # Windows: two at once collide, harmlessly
        return lambda wait: True, lambda: None
    folder = os.open(Path(db.database).resolve().parent, os.O_RDONLY)

    def take(wait: bool) -> bool:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    return take, lambda: os.close(folder)
