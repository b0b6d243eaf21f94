"""What finds the deliveries that nobody has any more: leases that ran out, and times that a clock set far ahead.

All in short steps, so that no writer is held up, however much waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from peewee import Database, Model

from hookline import clock, events, sql
from hookline.database import connected
from models import Delivery, Lane, stored_time

WEBHOOKS = 1000  # looked at in one go
ROWS = 1000  # of each kind, changed in one unit of work


def overdue(db: Database, after: str = "") -> tuple[list[str], str | None]:
    """Of the next webhooks for which something waits, by id, those whose lane should be open: leases that ran out.

    And the id to go on from, if any. Skips along the index from webhook to webhook. Raises Unavailable.
    """
    pending = "FROM deliveries d WHERE d.status = 'pending'"
    moment = sql.moment(db)
    statement = f"""
        WITH RECURSIVE waiting (id, place) AS (
            SELECT (SELECT min(d.webhook_id) {pending} AND d.webhook_id > {db.param}), 1
            UNION ALL
            SELECT (SELECT min(d.webhook_id) {pending} AND d.webhook_id > waiting.id), place + 1 FROM waiting
            WHERE id IS NOT NULL AND place < {WEBHOOKS}
        )
        SELECT id, (SELECT min(d.next_attempt_at) {pending} AND d.webhook_id = waiting.id) <= {moment} AND NOT EXISTS (
            SELECT 1 FROM lanes l WHERE l.webhook_id = waiting.id AND (l.due_at <= {moment} OR l.open_at > {moment}))
        FROM waiting WHERE id IS NOT NULL ORDER BY place"""
    now = stored_time(clock.now())
    with connected(db):
        found = db.execute_sql(statement, (after, now, now, now)).fetchall()
    last = found[-1][0] if len(found) == WEBHOOKS else None
    return [webhook_id for webhook_id, is_late in found if is_late], last


def open_lanes(db: Database, webhook_ids: Sequence[str]) -> int:
    """Make the lanes of these due, unless they are or rest; returns how many. Inside a unit of work."""
    statement = f"""
        INSERT INTO lanes (webhook_id, due_at, failures)
        SELECT w.webhook_id, {sql.moment(db)}, 0 FROM {sql.rows(db, "id")} CROSS JOIN webhooks w
        WHERE w.webhook_id = given.id ORDER BY w.webhook_id
        ON CONFLICT (webhook_id) DO UPDATE SET due_at = excluded.due_at
        WHERE lanes.due_at > excluded.due_at AND (lanes.open_at IS NULL OR lanes.open_at <= excluded.due_at)
        RETURNING webhook_id"""
    return len(db.execute_sql(statement, (stored_time(clock.now()), sql.ids(webhook_ids))).fetchall())


def rewind(db: Database, lease: float) -> bool:
    """The clock went far back: what was to wait until then is due now, and a lease is no longer than a lease.

    Inside a unit of work; returns whether more is left. A lane in which a delivery is being made in order stays closed
    for a lease at most.
    """
    now = clock.now()
    soon, lost = stored_time(now), stored_time(now + timedelta(seconds=lease))
    made = f"EXISTS {events.MADE_IN_ORDER}"
    changed = [
        _bring_forward(db, Delivery, ["next_attempt_at"], "status = 'pending' AND NOT leased", soon),
        _bring_forward(db, Delivery, ["next_attempt_at"], "status = 'pending' AND leased", lost),
        _bring_forward(db, Lane, ["due_at", "open_at"], f"NOT {made}", soon),
        _bring_forward(db, Lane, ["due_at", "open_at"], made, lost),
    ]
    return any(changed)


def _bring_forward(db: Database, model: type[Model], columns: Sequence[str], condition: str, to: str) -> bool:
    """Set the times in these columns, of the next rows in which the first of them is later; were there any?"""
    meta: Any = model._meta
    table, key, moment = meta.table_name, meta.primary_key.column_name, sql.moment(db)
    statement = f"""
        WITH batch AS MATERIALIZED (
            SELECT {key} FROM {table} WHERE {columns[0]} > {moment} AND {condition}
            LIMIT {ROWS}{sql.skip_locked(db, table)})
        UPDATE {table} SET {", ".join(f"{column} = {moment}" for column in columns)}
        WHERE {key} IN (SELECT {key} FROM batch) RETURNING {key}"""
    return bool(db.execute_sql(statement, (to, *[to] * len(columns))).fetchall())
