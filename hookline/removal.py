"""Removal: a webhook's deliveries are deleted before it, in short steps, so that they hold up no writer.

The webhook is disabled first, so that nothing is sent any more. If the removal is cut off, the caller deletes it again.
"""

from __future__ import annotations

from peewee import Database

from hookline import clock, steps
from hookline.store import locks, sql
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import stored_time

BATCH = 500  # deliveries deleted in one unit of work
REASON = "it is being deleted"


def delete_deliveries(db: Database, webhook_id: str) -> None:
    """Delete the deliveries of a webhook, if there are many. Raises Unavailable."""
    steps.run(db, _work(webhook_id))


async def delete_deliveries_beside(storage: Storage, webhook_id: str) -> None:
    """Like `delete_deliveries`, with rests between the steps, for other writers. Raises Unavailable."""
    await steps.run_beside(storage, _work(webhook_id))


def _work(webhook_id: str) -> steps.Work[None]:
    if not (yield steps.look(is_large, webhook_id)):
        return
    yield steps.write(disable, webhook_id)
    while (yield steps.write(delete_oldest, webhook_id)) == BATCH:
        pass


def is_large(db: Database, webhook_id: str) -> bool:
    """Does it have more deliveries than one step deletes? Raises Unavailable."""
    statement = f"""
        SELECT delivery_id FROM deliveries WHERE webhook_id = {sql.param(db, "webhook_id")}
        ORDER BY delivery_id LIMIT 1 OFFSET {BATCH}"""
    with connected(db):
        return db.execute_sql(statement, {"webhook_id": webhook_id}).fetchone() is not None


def disable(db: Database, webhook_id: str) -> None:
    """Disable it, unless it is disabled. Raises Unavailable."""
    statement = f"""
        UPDATE webhooks SET enabled = FALSE, disabled_at = {sql.time(db, "now")}, disabled_reason = '{REASON}'
        WHERE enabled AND webhook_id = {sql.param(db, "webhook_id")}"""
    with transaction(db):
        db.execute_sql(statement, {"now": stored_time(clock.now()), "webhook_id": webhook_id})


def delete_oldest(db: Database, webhook_id: str) -> int:
    """Delete its oldest deliveries with their attempts, BATCH at most; returns how many. Raises Unavailable."""
    statement = f"""
        DELETE FROM deliveries WHERE delivery_id IN (
            SELECT delivery_id FROM deliveries WHERE webhook_id = {sql.param(db, "webhook_id")}
            ORDER BY delivery_id LIMIT {BATCH})"""
    with transaction(db):
        locks.lock_webhooks(db, [webhook_id])
        return int(db.execute_sql(statement, {"webhook_id": webhook_id}).rowcount)
