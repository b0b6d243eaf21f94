"""The rows behind the worker: loading and claiming deliveries, settling them, and the lanes in which they wait.

Every function runs inside one unit of work. A lane is one webhook's queue: it is claimed as a whole, so a webhook that
hangs with 100,000 deliveries behind it costs one row here, and a few slots there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache

from peewee import Database

from hookline import clock, policy
from hookline.lanes import in_order_sql, next_attempt_at, next_attempt_sql, open_lanes
from hookline.policy import Rules
from hookline.store import locks, sql
from hookline.store.pool import is_postgres
from hookline.tables import read_time, stored_time
from hookline.worker.jobs import Job

LANES_AT_ONCE = 100
CANCELLED_AT_ONCE = 1000
BY_DISABLING = "the webhook was disabled"


def load(
    db: Database,
    leased: Sequence[tuple[int, str]],
    since: float,
    lanes: Mapping[str, tuple[int, str | None, str | None]] | None = None,
) -> list[Job]:
    """The jobs of these deliveries (id, end of the lease), as far as they are committed and still leased.

    `since`: when the leases began, of time.monotonic(). `lanes`: for each webhook the last three fields of its jobs.
    """
    found = db.execute_sql(load_sql(db), (sql.parameter(leased),)).fetchall()
    wanted = {row[2] for row in found}
    select = "SELECT event_id, event_type, payload, created_at FROM events WHERE event_id IN "
    rows = db.execute_sql(f"{select}(SELECT id FROM {sql.rows(db, 'id')})", (sql.ids(wanted),)).fetchall()
    contents = {
        event_id: (event_type, payload.encode(), clock.legacy_time(read_time(created_at)), since)
        for event_id, event_type, payload, created_at in rows
    }
    none = (0, None, None)
    return [
        Job._make((*row, *contents[row[2]], *(lanes[row[1]] if lanes else none)))
        for row in found
        if row[2] in contents  # else the sweep removes it: see orphans.py
    ]


@lru_cache(maxsize=8)
def load_sql(db: Database) -> str:
    return f"""
        SELECT d.delivery_id, d.webhook_id, d.event_id, d.attempts, d.attempts_before, w.url,
               w.secret, w.previous_secret, w.previous_secret_expires_at, w.earlier_secrets,
               w.headers, w.retry_schedule, w.rate_limit, w.ordered
        FROM {sql.rows(db, "id bigint", "until timestamptz")}
        CROSS JOIN deliveries d CROSS JOIN webhooks w
        WHERE d.delivery_id = given.id AND w.webhook_id = d.webhook_id AND w.enabled
              AND d.status = 'pending' AND d.leased AND (d.next_attempt_at = given.until OR {in_order_sql("d")})
        ORDER BY d.delivery_id"""


def next_due(db: Database, busy: Sequence[str]) -> datetime | None:
    """When the next lane is due, those of the busy webhooks aside; None without lanes."""
    others = f"webhook_id NOT IN (SELECT id FROM {sql.rows(db, 'id')})" if busy else "TRUE"
    if not is_postgres(db):  # which may have lanes of nobody, until the sweep removes them
        others += " AND EXISTS (SELECT 1 FROM webhooks w WHERE w.webhook_id = lanes.webhook_id)"
    statement = f"SELECT due_at FROM lanes WHERE {others} ORDER BY due_at LIMIT 1"
    row = db.execute_sql(statement, (sql.ids(busy),) if busy else ()).fetchone()
    return read_time(row[0]) if row else None


def claim(db: Database, rules: Rules, free: int, in_flight: Mapping[str, int], busy: Sequence[str]) -> list[Job]:
    """Lease what is due in the due lanes, at most `free` deliveries, and a fair share of each lane."""
    now, since = clock.now(), time.monotonic()
    lost = stored_time(now + timedelta(seconds=rules.lease))
    given = (stored_time(now), sql.ids(busy))
    due = db.execute_sql(due_sql(db, locks.skip_locked(db, "l")), given).fetchall()
    if not due:  # others hold all that are due, perhaps who publishes to them without pause: stand in line for one
        locks.limit_lock_waits(db)
        due = db.execute_sql(due_sql(db, locks.for_update(db, "l"), at_once=1), given).fetchall()
    leased: list[tuple[int, str]] = []
    lanes: dict[str, tuple[int, str | None, str | None]] = {}
    for webhook_id, failures, enabled, ordered, rate_limit in due:
        if not enabled:
            _cancel_some(db, webhook_id, now)
            continue
        left = free - len(leased)
        share = rules.share - in_flight.get(webhook_id, 0)
        budget = min(policy.lane_budget(failures, bool(ordered), rate_limit, free), left, share)
        if budget <= 0:
            continue
        ids = _lease(db, webhook_id, bool(ordered), budget, stored_time(now), lost)
        closed_until = lost if ids and (failures or ordered) else None
        opens = stored_time(now + policy.lane_rest(len(ids), rate_limit)) if rate_limit and ids else None
        _move_on(db, webhook_id, now, closed_until or opens, more=len(ids) == budget)
        lanes[webhook_id] = (failures, closed_until, opens)
        leased += [(delivery_id, lost) for delivery_id in ids]
    return load(db, leased, since, lanes) if leased else []


def due_sql(db: Database, lock: str, at_once: int = LANES_AT_ONCE) -> str:
    return f"""
        SELECT l.webhook_id, l.failures, w.enabled, w.ordered, w.rate_limit
        FROM lanes l JOIN webhooks w ON w.webhook_id = l.webhook_id
        WHERE l.due_at <= {sql.moment(db)} AND l.webhook_id NOT IN (SELECT id FROM {sql.rows(db, "id")})
        ORDER BY l.due_at LIMIT {at_once}{lock}"""


def _lease(db: Database, webhook_id: str, ordered: bool, budget: int, now: str, lost: str) -> list[int]:
    """Lease the oldest due deliveries of a webhook. With strict order they keep their place: the lane is the lease."""
    moment = sql.moment(db)
    statement = f"""
        WITH due AS MATERIALIZED (
            SELECT delivery_id FROM deliveries
            WHERE webhook_id = {db.param} AND status = 'pending' AND next_attempt_at <= {moment}
            ORDER BY next_attempt_at, delivery_id LIMIT {db.param}{locks.skip_locked(db, "deliveries")})
        UPDATE deliveries SET leased = TRUE,
               next_attempt_at = {moment}
        WHERE delivery_id IN (SELECT delivery_id FROM due) AND status = 'pending'
        RETURNING delivery_id"""
    parameters = (webhook_id, now, budget, next_attempt_at(ordered, lost))
    return [row[0] for row in db.execute_sql(statement, parameters).fetchall()]


def _move_on(db: Database, webhook_id: str, now: datetime, opens: str | None, *, more: bool) -> None:
    """Set when the lane is looked at next: when it opens, now if more is due, else when its next delivery is."""
    due = opens
    if due is None and more:
        due = stored_time(now)
    if due is None:
        waiting = f"SELECT min(next_attempt_at) FROM deliveries WHERE webhook_id = {db.param} AND status = 'pending'"
        first = read_time(db.execute_sql(waiting, (webhook_id,)).fetchone()[0])
        if first is None:
            db.execute_sql(f"DELETE FROM lanes WHERE webhook_id = {db.param}", (webhook_id,))
            return
        due = stored_time(max(first, now))
    update = f"UPDATE lanes SET due_at = {sql.moment(db)}, open_at = {sql.moment(db)} WHERE webhook_id = {db.param}"
    db.execute_sql(update, (due, opens, webhook_id))


def _cancel_some(db: Database, webhook_id: str, now: datetime) -> None:
    """Cancel what waits for a disabled webhook, a batch at a time, so that no writer is held up."""
    statement = f"""
        WITH batch AS MATERIALIZED (
            SELECT delivery_id FROM deliveries WHERE webhook_id = {db.param} AND status = 'pending'
            LIMIT {CANCELLED_AT_ONCE}{locks.skip_locked(db, "deliveries")})
        UPDATE deliveries SET status = 'cancelled', leased = FALSE, next_attempt_at = NULL,
               finished_at = {sql.moment(db)}, reason = '{BY_DISABLING}'
        WHERE delivery_id IN (SELECT delivery_id FROM batch) AND status = 'pending'
        RETURNING delivery_id"""
    cancelled = db.execute_sql(statement, (webhook_id, stored_time(now))).fetchall()
    _move_on(db, webhook_id, now, None, more=len(cancelled) == CANCELLED_AT_ONCE)


def release(db: Database, delivery_ids: Sequence[int]) -> None:
    """Give leases back, to be sent by another worker at once."""
    now = stored_time(clock.now())
    given = f"delivery_id IN (SELECT id FROM {sql.rows(db, 'id bigint')}) AND status = 'pending' AND leased"
    moment = sql.moment(db)
    statement = f"""
        UPDATE deliveries SET leased = FALSE,
               next_attempt_at = {next_attempt_sql(in_order_sql("deliveries"), moment)}
        WHERE {given} RETURNING webhook_id"""
    rows = db.execute_sql(statement, (now, sql.ids(delivery_ids))).fetchall()
    if rows:
        open_lanes(db, {webhook_id for (webhook_id,) in rows}, now=True)
