"""What finds the deliveries that nobody has any more: leases that ran out, and times that a clock set far ahead.

All in short steps, so that no writer is held up, however much waits.
"""

from __future__ import annotations

import logging

from peewee import Database

from hookline import clock
from hookline.store import sql
from hookline.store.units import connected
from hookline.tables import stored_time

log = logging.getLogger("hookline")

WEBHOOKS = 1000  # looked at in one go
PENDING = "FROM deliveries d WHERE d.status = 'pending'"


def overdue(db: Database, after: str = "") -> tuple[list[str], str | None]:
    """Of the next webhooks for which something waits, by id, those whose lane should be open: leases that ran out.

    And the id to go on from, if any. Skips along the index from webhook to webhook. Raises Unavailable.
    """
    moment = sql.moment(db)
    statement = f"""{waiting(db)}
        SELECT id, (SELECT min(d.next_attempt_at) {PENDING} AND d.webhook_id = waiting.id) <= {moment} AND NOT EXISTS (
            SELECT 1 FROM lanes l WHERE l.webhook_id = waiting.id AND (l.due_at <= {moment} OR l.open_at > {moment}))
        FROM waiting WHERE id IS NOT NULL ORDER BY place"""
    now = stored_time(clock.now())
    with connected(db):
        found = db.execute_sql(statement, (after, now, now, now)).fetchall()
    last = found[-1][0] if len(found) == WEBHOOKS else None
    return [webhook_id for webhook_id, is_late in found if is_late], last


def waiting(db: Database) -> str:
    """`waiting (id, place)`: the next webhooks, behind the one in a parameter, for which something waits."""
    return f"""
        WITH RECURSIVE waiting (id, place) AS (
            SELECT (SELECT min(d.webhook_id) {PENDING} AND d.webhook_id > {db.param}), 1
            UNION ALL
            SELECT (SELECT min(d.webhook_id) {PENDING} AND d.webhook_id > waiting.id), place + 1 FROM waiting
            WHERE id IS NOT NULL AND place < {WEBHOOKS}
        )"""
