"""Bring forward the times that a clock which was ahead has set too late, in short steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, lanes, policy
from hookline.policy import Rules
from hookline.store import locks, sql
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from hookline.store.units import connected
from hookline.tables import read_time, stored_time
from hookline.worker import expired_leases

log = logging.getLogger("hookline")

ROWS = 1000  # changed in one unit of work
LATE = 20_000  # deliveries that are due too late, read in one step
JUMP = 60.0  # seconds that clocks may differ, or go back, before what they have set is looked through
SKEW = 600.0  # seconds that a lease may be longer than ours: another worker's LEASE may be set otherwise


class Misdated(NamedTuple):
    """The id of a delivery or of a lane's webhook, and the stored time for which it waits, as it was seen."""

    row_id: Any
    due_at: str


class MisdatedRows(NamedTuple):
    """The rows of one step, and the webhook to go on from, None at the end."""

    deliveries: list[Misdated]
    lanes: list[Misdated]
    after: str | None


async def bring_all_forward(storage: Storage, rules: Rules) -> int:
    """Bring forward all that is due later than it can be, in short steps; returns how much. Raises Unavailable."""
    after: str | None = ""
    total = 0
    while after is not None:
        began_after, changed = after, 0
        deliveries, late_lanes, after = await storage.scan(misdated, rules, began_after)
        for start in range(0, max(len(deliveries), len(late_lanes)), ROWS):
            batch = slice(start, start + ROWS)
            changed += await storage.write(bring_forward, rules, deliveries[batch], late_lanes[batch])
        total += changed
        if after == began_after and not changed:
            break  # others are at it
    if total:
        log.warning("brought forward %s times of deliveries and lanes that a clock which was ahead had set", total)
    return total


def misdated(db: Database, rules: Rules, after: str = "") -> MisdatedRows:
    """Of the next webhooks for which something waits, the deliveries and lanes that are due later than they can be.

    A clock that was ahead has set these times, perhaps of another process, or before this one began. Raises
    Unavailable.
    """
    with connected(db):
        waiting = expired_leases.waiting_sql(db, expired_leases.WEBHOOKS)
        select = f"{waiting} SELECT id FROM waiting WHERE id IS NOT NULL ORDER BY position"
        ids = [webhook_id for (webhook_id,) in db.execute_sql(select, {"after": after}).fetchall()]
        now = clock.now()
        values = {
            "ids": sql.encoded_ids(ids),
            "now": stored_time(now),
            "ahead_of_clocks": stored_time(now + timedelta(seconds=JUMP)),
            "ahead_of_leases": stored_time(now + timedelta(seconds=rules.lease + SKEW)),
        }
        deliveries = _as_seen(db.execute_sql(late_deliveries_sql(db, rules), values).fetchall())
        late_lanes = _as_seen(db.execute_sql(late_lanes_sql(db, rules), values).fetchall())
    following = ids[-1] if len(ids) == expired_leases.WEBHOOKS else None
    return MisdatedRows(deliveries, late_lanes, after if len(deliveries) == LATE else following)


def _as_seen(rows: Iterable[tuple[Any, datetime | str]]) -> list[Misdated]:
    return [Misdated(row_id, stored_time(due_at)) for row_id, value in rows if (due_at := read_time(value)) is not None]


def late_deliveries_sql(db: Database, rules: Rules) -> str:
    """A lease lasts a lease; what was never attempted was due when it was made; a retry is due no later than the
    longest step of its schedule, or a day of Retry-After, behind its last attempt, and that one is past.
    """
    ahead_of_clocks, ahead_of_leases = sql.time(db, "ahead_of_clocks"), sql.time(db, "ahead_of_leases")
    wait = sql.seconds(db, "d.last_started_at", "d.next_attempt_at")
    late = f"""
        w.webhook_id = ids.id AND d.webhook_id = ids.id AND d.status = 'pending'
        AND d.next_attempt_at > {ahead_of_clocks}
        AND CASE WHEN d.leased THEN d.next_attempt_at > {ahead_of_leases}
                 ELSE d.last_started_at IS NULL OR d.last_started_at > {ahead_of_clocks}
                      OR {wait} > {_longest_wait_sql(db, rules)} END"""
    columns = "d.delivery_id, d.next_attempt_at"
    each = sql.each(db, sql.values(db, "ids", "id"), "webhooks w CROSS JOIN deliveries d", columns, late, alias="d")
    return f"SELECT {columns} {each} LIMIT {LATE}"


def late_lanes_sql(db: Database, rules: Rules) -> str:
    """A lane rests for a lease or by its rate limit; while it fails, no longer than a delivery waits, as above."""
    ahead_of_clocks, ahead_of_leases = sql.time(db, "ahead_of_clocks"), sql.time(db, "ahead_of_leases")
    wait, rest = sql.seconds(db, "w.last_failure", "l.open_at"), sql.seconds(db, sql.time(db, "now"), "l.open_at")
    late = f"""
        w.webhook_id = ids.id AND l.webhook_id = ids.id AND l.open_at > {ahead_of_clocks}
        AND CASE WHEN {lanes.making_in_order_sql("l")} THEN l.open_at > {ahead_of_leases}
                 WHEN l.failures = 0
                 THEN l.open_at > {ahead_of_leases} AND {rest} > coalesce(1.0 / w.rate_limit, 0) + {JUMP}
                 ELSE coalesce(w.last_failure > {ahead_of_clocks} OR {wait} > {_longest_wait_sql(db, rules)}, FALSE)
            END"""
    columns = "l.webhook_id, l.open_at"
    each = sql.each(db, sql.values(db, "ids", "id"), "webhooks w CROSS JOIN lanes l", columns, late, alias="l")
    return f"SELECT {columns} {each}"


def _longest_wait_sql(db: Database, rules: Rules) -> str:
    """Seconds from the start of an attempt of webhook `w` to the next one, at most."""
    own = "(SELECT max(value) FROM json_each(w.retry_schedule))"
    if is_postgres(db):
        own = "(SELECT max(value::float) FROM json_array_elements_text(w.retry_schedule::json))"
    step = f"coalesce({own}, {float(max(rules.retry_schedule, default=0))}) * {1 + policy.JITTER}"
    return f"({sql.later(db, step, str(policy.MAX_RETRY_AFTER))} + {rules.lease + JUMP})"


def bring_forward(db: Database, rules: Rules, deliveries: Iterable[Misdated], late_lanes: Iterable[Misdated]) -> int:
    """Set these times as they should be, unless they have changed; returns of how many. Inside a unit of work.

    What waits is due now, and a lease ends in a lease. A lane in which a delivery is being made in order stays closed
    for a lease at most.
    """
    now, lease_end = sql.time(db, "now"), sql.time(db, "lease_end")
    values = {
        "now": stored_time(clock.now()),
        "lease_end": stored_time(clock.now() + timedelta(seconds=rules.lease)),
        "deliveries_seen": sql.encoded(deliveries),
        "lanes_seen": sql.encoded(late_lanes),
    }
    locks.limit_lock_waits(db)
    statement = f"""
        UPDATE deliveries SET next_attempt_at = CASE WHEN leased THEN {lease_end} ELSE {now} END
        FROM {sql.values(db, "deliveries_seen", "id bigint", "seen timestamptz")}
        WHERE delivery_id = deliveries_seen.id AND status = 'pending' AND next_attempt_at = deliveries_seen.seen
        RETURNING webhook_id"""
    webhook_ids = [webhook_id for (webhook_id,) in db.execute_sql(statement, values).fetchall()]
    opens_at = f"CASE WHEN {lanes.making_in_order_sql('lanes')} THEN {lease_end} ELSE {now} END"
    statement = f"""
        UPDATE lanes SET due_at = {opens_at}, open_at = {opens_at}
        FROM {sql.values(db, "lanes_seen", "id", "seen timestamptz")}
        WHERE webhook_id = lanes_seen.id AND open_at = lanes_seen.seen RETURNING webhook_id"""
    opened = db.execute_sql(statement, values).fetchall()
    lanes.make_due(db, webhook_ids)
    return len(webhook_ids) + len(opened)
