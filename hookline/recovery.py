"""What finds the deliveries that nobody has any more: leases that ran out, and times that a clock set far ahead.

All in short steps, so that no writer is held up, however much waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from peewee import Database

from hookline import clock, events, sql
from hookline.database import connected
from models import stored_time

WEBHOOKS = 1000  # looked at in one go
ROWS = 1000  # changed in one unit of work


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


def far_ahead(db: Database, lease: float) -> list[tuple[list[int], list[str]]]:
    """After the clock went far back: the deliveries and the lanes whose time is later than it may be, in batches.

    What waits may be due now, and a lease is no longer than a lease. Raises Unavailable.
    """
    now, lost = _now_and_lost(lease)
    with connected(db):
        deliveries = db.execute_sql(f"SELECT delivery_id FROM deliveries WHERE {_late(db)}", (now, lost)).fetchall()
        lanes = db.execute_sql(f"SELECT webhook_id FROM lanes WHERE {_closed(db)}", (now, lost)).fetchall()
    batches: list[tuple[list[int], list[str]]] = []
    batches += [([row[0] for row in deliveries[at : at + ROWS]], []) for at in range(0, len(deliveries), ROWS)]
    batches += [([], [row[0] for row in lanes[at : at + ROWS]]) for at in range(0, len(lanes), ROWS)]
    return batches


def bring_forward(db: Database, lease: float, delivery_ids: Sequence[int], webhook_ids: Sequence[str]) -> None:
    """Set the times of such a batch as they should be, unless they have changed. Inside a unit of work.

    A lane in which a delivery is being made in order stays closed for a lease at most.
    """
    now, lost = _now_and_lost(lease)
    moment = sql.moment(db)
    sql.wait_briefly(db)
    db.execute_sql(
        f"UPDATE deliveries SET next_attempt_at = CASE WHEN leased THEN {moment} ELSE {moment} END "
        f"WHERE delivery_id IN (SELECT id FROM {sql.rows(db, 'id bigint')}) AND {_late(db)}",
        (lost, now, sql.ids(delivery_ids), now, lost),
    )
    until = f"CASE WHEN EXISTS {events.MADE_IN_ORDER} THEN {moment} ELSE {moment} END"
    db.execute_sql(
        f"UPDATE lanes SET due_at = {until}, open_at = {until} "
        f"WHERE webhook_id IN (SELECT id FROM {sql.rows(db, 'id')}) AND {_closed(db)}",
        (lost, now, lost, now, sql.ids(webhook_ids), now, lost),
    )


def _now_and_lost(lease: float) -> tuple[str, str]:
    now = clock.now()
    return stored_time(now), stored_time(now + timedelta(seconds=lease))


def _late(db: Database) -> str:
    moment = sql.moment(db)
    return (
        f"status = 'pending' AND (NOT leased AND next_attempt_at > {moment} OR leased AND next_attempt_at > {moment})"
    )


def _closed(db: Database) -> str:
    moment = sql.moment(db)
    made = f"EXISTS {events.MADE_IN_ORDER}"
    return f"(NOT {made} AND lanes.due_at > {moment} OR {made} AND lanes.due_at > {moment})"
