"""Find the deliveries of workers that died: leases that have expired while their lane is not due."""

from __future__ import annotations

from functools import lru_cache

from peewee import Database

from hookline import clock
from hookline.store import sql
from hookline.store.units import connected
from hookline.tables import stored_time

WEBHOOKS = 1000  # looked at in one step
PENDING = "FROM deliveries d WHERE d.status = 'pending'"


def overdue(db: Database, after: str = "") -> tuple[list[str], str | None]:
    """Of the next webhooks for which something waits, by id, those whose lane should be due; and the id to go on from.

    That is None at the end. Skips along the index from webhook to webhook. Raises Unavailable.
    """
    with connected(db):
        values = {"after": after, "now": stored_time(clock.now())}
        rows = db.execute_sql(overdue_sql(db, WEBHOOKS), values).fetchall()
    last = rows[-1][0] if len(rows) == WEBHOOKS else None
    return [webhook_id for webhook_id, is_overdue in rows if is_overdue], last


@lru_cache(maxsize=8)
def overdue_sql(db: Database, limit: int) -> str:
    now = sql.time(db, "now")
    return f"""{waiting_sql(db, limit)}
        SELECT id, (SELECT min(d.next_attempt_at) {PENDING} AND d.webhook_id = waiting.id) <= {now} AND NOT EXISTS (
            SELECT 1 FROM lanes l WHERE l.webhook_id = waiting.id AND (l.due_at <= {now} OR l.open_at > {now}))
        FROM waiting WHERE id IS NOT NULL ORDER BY position"""


def waiting_sql(db: Database, limit: int) -> str:
    """WITH `waiting (id, position)`: the next webhooks, behind the parameter `after`, for which something waits."""
    return f"""
        WITH RECURSIVE waiting (id, position) AS (
            SELECT (SELECT min(d.webhook_id) {PENDING} AND d.webhook_id > {sql.param(db, "after")}), 1
            UNION ALL
            SELECT (SELECT min(d.webhook_id) {PENDING} AND d.webhook_id > waiting.id), waiting.position + 1 FROM waiting
            WHERE id IS NOT NULL AND waiting.position < {limit}
        )"""
