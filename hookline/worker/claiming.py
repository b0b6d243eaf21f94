"""Claim deliveries for this process, load their jobs, and release their leases. Runs inside units of work.

A lane, the queue of one webhook, is claimed as a whole: a webhook that hangs with 100,000 deliveries behind it costs
one row in `lanes`, and a few slots of a worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, policy
from hookline.lanes import Slots, in_order_sql, next_attempt_at, next_attempt_sql, open_lanes
from hookline.store import locks, sql
from hookline.store.pool import is_postgres
from hookline.tables import read_time, stored_time
from hookline.worker.capacity import saturated
from hookline.worker.jobs import PUBLISHED, Job, LaneClaim

LANES_AT_ONCE = 100
CANCELLED_AT_ONCE = 1000
BY_DISABLING = "the webhook was disabled"
JOB_COLUMNS = Job._fields[: Job._fields.index("event_type")]
OF_DELIVERY = ("webhook_id", "event_id", "delivery_id", "attempts", "attempts_before")  # the others are of the webhook

Lease = tuple[int, str]  # delivery_id and lease_end


def next_due(db: Database, saturated_ids: Sequence[str]) -> datetime | None:
    """The time at which the next lane is due, but for those of saturated webhooks; None without lanes."""
    others = f"webhook_id NOT IN (SELECT id FROM {sql.values(db, 'webhooks', 'id')})" if saturated_ids else "TRUE"
    if not is_postgres(db):  # which may have lanes without a webhook, until the sweep removes them
        others += " AND EXISTS (SELECT 1 FROM webhooks w WHERE w.webhook_id = lanes.webhook_id)"
    statement = f"SELECT due_at FROM lanes WHERE {others} ORDER BY due_at LIMIT 1"
    row = db.execute_sql(statement, {"webhooks": sql.encoded_ids(saturated_ids)} if saturated_ids else ()).fetchone()
    return read_time(row[0]) if row else None


class DueLane(NamedTuple):
    """A row of `due_sql`."""

    webhook_id: str
    failures: int
    enabled: bool
    ordered: bool | None
    rate_limit: float | None


def claim(db: Database, slots: Slots, lease: float) -> list[Job]:
    """Lease due deliveries of due lanes for `lease` seconds: at most `slots.free`, and a fair share of each lane."""
    now, since = clock.now(), time.monotonic()
    lease_end = stored_time(now + timedelta(seconds=lease))
    leases: list[Lease] = []
    claims: dict[str, LaneClaim] = {}
    for lane in _due_lanes(db, now, saturated(slots)):
        if not lane.enabled:
            _cancel_some(db, lane.webhook_id, now)
            continue
        in_flight = slots.in_flight.get(lane.webhook_id, 0)
        share = policy.lane_budget(lane.failures, bool(lane.ordered), lane.rate_limit, slots.free)
        budget = min(share, slots.free - len(leases), slots.per_webhook - in_flight)
        if budget > 0:
            delivery_ids, claims[lane.webhook_id] = _claim_lane(db, lane, budget, now, lease_end)
            leases += [(delivery_id, lease_end) for delivery_id in delivery_ids]
    return load(db, leases, since, claims) if leases else []


def _due_lanes(db: Database, now: datetime, saturated_ids: Sequence[str]) -> list[DueLane]:
    """Lock due lanes, but for those of saturated webhooks; the one that has been due for longest comes first."""
    values = {"now": stored_time(now), "webhooks": sql.encoded_ids(saturated_ids)}
    rows = db.execute_sql(due_sql(db, locks.skip_locked(db, "l")), values).fetchall()
    if not rows:  # others have locked all, perhaps because they publish to them without pause: wait in line for one
        locks.limit_lock_waits(db)
        rows = db.execute_sql(due_sql(db, locks.for_update(db, "l"), at_once=1), values).fetchall()
    return [DueLane(*row) for row in rows]


@lru_cache(maxsize=8)
def due_sql(db: Database, lock: str, at_once: int = LANES_AT_ONCE) -> str:
    return f"""
        SELECT l.webhook_id, l.failures, w.enabled, w.ordered, w.rate_limit
        FROM lanes l JOIN webhooks w ON w.webhook_id = l.webhook_id
        WHERE l.due_at <= {sql.time(db, "now")}
              AND l.webhook_id NOT IN (SELECT id FROM {sql.values(db, "webhooks", "id")})
        ORDER BY l.due_at LIMIT {at_once}{lock}"""


def _claim_lane(db: Database, lane: DueLane, budget: int, now: datetime, lease_end: str) -> tuple[list[int], LaneClaim]:
    """Lease the oldest due deliveries of a lane and reschedule it; returns their ids.

    With strict order they keep their position: the lane, which is closed until the lease ends, is the lease.
    """
    values = {
        "webhook_id": lane.webhook_id,
        "now": stored_time(now),
        "budget": budget,
        "next_attempt_at": next_attempt_at(lane.ordered, lease_end),
    }
    delivery_ids = [row[0] for row in db.execute_sql(lease_sql(db), values).fetchall()]
    claimed = LaneClaim(lane.failures)
    if delivery_ids and (lane.failures or lane.ordered):
        claimed = claimed._replace(closed_until=lease_end)
    if delivery_ids and lane.rate_limit:
        opens_at = now + policy.lane_rest(len(delivery_ids), lane.rate_limit)
        claimed = claimed._replace(opens_at=stored_time(opens_at))
    _reschedule(db, lane.webhook_id, now, claimed.closed_until or claimed.opens_at, more=len(delivery_ids) == budget)
    return delivery_ids, claimed


@lru_cache(maxsize=8)
def lease_sql(db: Database) -> str:
    return f"""
        WITH due AS MATERIALIZED (
            SELECT delivery_id FROM deliveries
            WHERE webhook_id = {sql.param(db, "webhook_id")} AND status = 'pending'
                  AND next_attempt_at <= {sql.time(db, "now")}
            ORDER BY next_attempt_at, delivery_id LIMIT {sql.param(db, "budget")}{locks.skip_locked(db, "deliveries")})
        UPDATE deliveries SET leased = TRUE, next_attempt_at = {sql.time(db, "next_attempt_at")}
        WHERE delivery_id IN (SELECT delivery_id FROM due) AND status = 'pending'
        RETURNING delivery_id"""


def _reschedule(db: Database, webhook_id: str, now: datetime, opens_at: str | None, *, more: bool) -> None:
    """Set when a lane is due: when it opens, else now if `more` is due, else with its next delivery, if any."""
    this = f"webhook_id = {sql.param(db, 'webhook_id')}"
    due_at = opens_at or (stored_time(now) if more else None)
    if due_at is None:
        select = f"SELECT min(next_attempt_at) FROM deliveries WHERE {this} AND status = 'pending'"
        first = read_time(db.execute_sql(select, {"webhook_id": webhook_id}).fetchone()[0])
        if first is None:
            db.execute_sql(f"DELETE FROM lanes WHERE {this}", {"webhook_id": webhook_id})
            return
        due_at = stored_time(max(first, now))
    update = f"UPDATE lanes SET due_at = {sql.time(db, 'due_at')}, open_at = {sql.time(db, 'opens_at')} WHERE {this}"
    db.execute_sql(update, {"webhook_id": webhook_id, "due_at": due_at, "opens_at": opens_at})


def _cancel_some(db: Database, webhook_id: str, now: datetime) -> None:
    """Cancel what waits for a disabled webhook, CANCELLED_AT_ONCE at most, so that no writer is held up."""
    statement = f"""
        WITH batch AS MATERIALIZED (
            SELECT delivery_id FROM deliveries WHERE webhook_id = {sql.param(db, "webhook_id")} AND status = 'pending'
            LIMIT {CANCELLED_AT_ONCE}{locks.skip_locked(db, "deliveries")})
        UPDATE deliveries SET status = 'cancelled', leased = FALSE, next_attempt_at = NULL,
               finished_at = {sql.time(db, "now")}, reason = '{BY_DISABLING}'
        WHERE delivery_id IN (SELECT delivery_id FROM batch) AND status = 'pending'
        RETURNING delivery_id"""
    cancelled = db.execute_sql(statement, {"webhook_id": webhook_id, "now": stored_time(now)}).fetchall()
    _reschedule(db, webhook_id, now, None, more=len(cancelled) == CANCELLED_AT_ONCE)


def load(
    db: Database, leases: Sequence[Lease], since: float, claims: Mapping[str, LaneClaim] | None = None
) -> list[Job]:
    """The jobs of these leases as far as their deliveries are committed and still leased.

    `since`: the start of the leases, of time.monotonic(). `claims`: by webhook, if they were claimed from lanes.
    """
    rows = db.execute_sql(load_sql(db), {"leases": sql.encoded(leases)}).fetchall()
    contents = _contents(db, {event_id for _, event_id, *_ in rows})
    return [
        Job(  # type: ignore[misc]  # `others` ends before event_type
            webhook_id,
            event_id,
            *others,
            **contents[event_id],
            leased_at=since,
            lane=claims[webhook_id] if claims else PUBLISHED,
        )
        for webhook_id, event_id, *others in rows
        if event_id in contents  # else the sweep removes it: see orphans.py
    ]


def _contents(db: Database, event_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The fields that jobs take from these events, by event_id. Jobs of the same event share its body."""
    rows = db.execute_sql(events_sql(db), {"ids": sql.encoded_ids(event_ids)}).fetchall()
    return {
        event_id: {
            "event_type": event_type,
            "body": payload.encode(),
            "event_time": clock.legacy_time(read_time(created_at)),
        }
        for event_id, event_type, payload, created_at in rows
    }


@lru_cache(maxsize=8)
def load_sql(db: Database) -> str:
    columns = ", ".join(f"{'d' if name in OF_DELIVERY else 'w'}.{name}" for name in JOB_COLUMNS)
    return f"""
        SELECT {columns}
        FROM {sql.values(db, "leases", "id bigint", "lease_end timestamptz")}
        CROSS JOIN deliveries d CROSS JOIN webhooks w
        WHERE d.delivery_id = leases.id AND w.webhook_id = d.webhook_id AND w.enabled
              AND d.status = 'pending' AND d.leased AND (d.next_attempt_at = leases.lease_end OR {in_order_sql("d")})
        ORDER BY d.delivery_id"""


@lru_cache(maxsize=8)
def events_sql(db: Database) -> str:
    return f"""
        SELECT event_id, event_type, payload, created_at FROM events
        WHERE event_id IN (SELECT id FROM {sql.values(db, "ids", "id")})"""


def release(db: Database, delivery_ids: Sequence[int]) -> None:
    """Give leases back and open their lanes, so that another worker sends them at once."""
    next_attempt = next_attempt_sql(in_order_sql("deliveries"), sql.time(db, "now"))
    statement = f"""
        UPDATE deliveries SET leased = FALSE, next_attempt_at = {next_attempt}
        WHERE delivery_id IN (SELECT id FROM {sql.values(db, "ids", "id bigint")}) AND status = 'pending' AND leased
        RETURNING webhook_id"""
    values = {"ids": sql.encoded_ids(delivery_ids), "now": stored_time(clock.now())}
    if rows := db.execute_sql(statement, values).fetchall():
        open_lanes(db, {webhook_id for (webhook_id,) in rows}, now=True)
