"""What goes before a webhook is deleted: its deliveries, in short steps, so that no writer is held up by many of them.

The webhook is disabled first, so that nothing is sent any more. Who is cut off in the middle deletes it again.
"""

from __future__ import annotations

import asyncio
import time

from peewee import Database

from hookline import clock
from hookline.store import locks, sql
from hookline.store.storage import Storage
from hookline.store.units import connected, transaction
from hookline.tables import stored_time

BATCH = 500  # deliveries deleted in one unit of work
REASON = "it is being deleted"


def is_large(db: Database, webhook_id: str) -> bool:
    """Has it more deliveries than one step deletes? Raises Unavailable."""
    found = (
        f"SELECT delivery_id FROM deliveries WHERE webhook_id = {db.param} ORDER BY delivery_id LIMIT 1 OFFSET {BATCH}"
    )
    with connected(db):
        return db.execute_sql(found, (webhook_id,)).fetchone() is not None


def close(db: Database, webhook_id: str) -> None:
    """Disable it, if it is not. Raises Unavailable."""
    disable = f"enabled = FALSE, disabled_at = {sql.moment(db)}, disabled_reason = {db.param}"
    with transaction(db):
        given = (stored_time(clock.now()), REASON, webhook_id)
        db.execute_sql(f"UPDATE webhooks SET {disable} WHERE enabled AND webhook_id = {db.param}", given)


def step(db: Database, webhook_id: str) -> bool:
    """Delete the next of its deliveries, with their attempts; are there perhaps more? Raises Unavailable."""
    oldest = f"SELECT delivery_id FROM deliveries WHERE webhook_id = {db.param} ORDER BY delivery_id LIMIT {BATCH}"
    with transaction(db):
        locks.lock_webhooks(db, [webhook_id])
        cursor = db.execute_sql(f"DELETE FROM deliveries WHERE delivery_id IN ({oldest})", (webhook_id,))
        return int(cursor.rowcount) == BATCH


def delete_deliveries(db: Database, webhook_id: str) -> None:
    """Delete its deliveries, if there are many. Raises Unavailable."""
    if is_large(db, webhook_id):
        close(db, webhook_id)
        while step(db, webhook_id):
            time.sleep(0)  # so that who waits for the writer gets it


async def delete_deliveries_beside(storage: Storage, webhook_id: str) -> None:
    """The same, and rests as long as each step took, for the writers. Raises Unavailable."""
    if await storage.read(is_large, webhook_id):
        await storage.write(close, webhook_id)
        loop, more = asyncio.get_running_loop(), True
        while more:
            began = loop.time()
            more = await storage.write(step, webhook_id)
            await asyncio.sleep(loop.time() - began)
