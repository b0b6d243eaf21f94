"""Bring forward what a clock that was ahead has set too late, in short steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from peewee import Database

from hookline import clock, lanes, policy
from hookline.lanes import make_due
from hookline.policy import Rules
from hookline.store import locks, sql
from hookline.store.pool import is_postgres
from hookline.store.storage import Storage
from hookline.store.units import connected
from hookline.tables import read_time, stored_time
from hookline.worker import sweeper

log = logging.getLogger("hookline")

ROWS = 1000  # changed in one unit of work


LATE = 20_000  # deliveries that are due too late, found in one go


JUMP = 60.0  # seconds that clocks may differ or go back before what they have set is looked through


SKEW = 600.0  # seconds that a lease may be longer than ours: another worker's LEASE may be set otherwise


Misdated = tuple[Any, str]  # the id of a delivery or a webhook, and when it is due, as it was seen


async def bring_all_forward(storage: Storage, rules: Rules) -> int:
    """Bring forward all that is due later than it can be, in short steps; returns how much. Raises Unavailable."""
    after: str | None = ""
    total = 0
    while after is not None:
        looked, changed = after, 0
        found, resting, after = await storage.scan(misdated, rules, looked)
        for at in range(0, max(len(found), len(resting)), ROWS):
            batch = found[at : at + ROWS], resting[at : at + ROWS]
            changed += await storage.write(bring_forward, rules, *batch)
        total += changed
        if after == looked and not changed:
            break  # others are at it
    if total:
        log.warning("brought forward %s times of deliveries and lanes that a clock which was ahead had set", total)
    return total


def misdated(db: Database, rules: Rules, after: str = "") -> tuple[list[Misdated], list[Misdated], str | None]:
    """Of the next webhooks for which something waits, what is due later than it can be: deliveries and lanes.

    And the webhook to go on from, if any. A clock that was ahead has set these times, perhaps of another process, or
    before this one began. Raises Unavailable.
    """
    with connected(db):
        rows = db.execute_sql(
            f"{sweeper.waiting(db)} SELECT id FROM waiting WHERE id IS NOT NULL ORDER BY place", (after,)
        )
        ids = [row[0] for row in rows.fetchall()]
        now, ahead, of_leases = _limits(rules)
        deliveries = db.execute_sql(late_deliveries_sql(db, rules), (sql.ids(ids), ahead, of_leases, ahead)).fetchall()
        parameters = (sql.ids(ids), ahead, of_leases, of_leases, now, ahead)
        lanes = db.execute_sql(late_lanes_sql(db, rules), parameters).fetchall()
    following = ids[-1] if len(ids) == sweeper.WEBHOOKS else None
    return _as_seen(deliveries), _as_seen(lanes), after if len(deliveries) == LATE else following


def _as_seen(rows: Sequence[Any]) -> list[Misdated]:
    return [(row_id, stored_time(due)) for row_id, value in rows if (due := read_time(value)) is not None]


def late_deliveries_sql(db: Database, rules: Rules) -> str:
    """A lease lasts a lease; what was never attempted was due when it was made; a retry is due no later than the
    longest step of its schedule, or a day of Retry-After, behind its last attempt, and that one is past.
    """
    moment, wait = sql.moment(db), sql.seconds(db, "d.last_started_at", "d.next_attempt_at")
    late = f"""
        w.webhook_id = given.id AND d.webhook_id = given.id AND d.status = 'pending' AND d.next_attempt_at > {moment}
        AND CASE WHEN d.leased THEN d.next_attempt_at > {moment}
                 ELSE d.last_started_at IS NULL OR d.last_started_at > {moment} OR {wait} > {_longest(db, rules)} END"""
    columns = "d.delivery_id, d.next_attempt_at"
    found = sql.each(db, sql.rows(db, "id"), "webhooks w CROSS JOIN deliveries d", columns, late, alias="d")
    return f"SELECT {columns} {found} LIMIT {LATE}"


def late_lanes_sql(db: Database, rules: Rules) -> str:
    """A lane rests for a lease or by its rate limit; while it fails, no longer than a delivery waits, as above."""
    moment, wait = sql.moment(db), sql.seconds(db, "w.last_failure", "l.open_at")
    making, rest = lanes.making_in_order_sql("l"), sql.seconds(db, moment, "l.open_at")
    late = f"""
        w.webhook_id = given.id AND l.webhook_id = given.id AND l.open_at > {moment}
        AND CASE WHEN {making} THEN l.open_at > {moment}
                 WHEN l.failures = 0 THEN l.open_at > {moment} AND {rest} > coalesce(1.0 / w.rate_limit, 0) + {JUMP}
                 ELSE coalesce(w.last_failure > {moment} OR {wait} > {_longest(db, rules)}, FALSE) END"""
    columns = "l.webhook_id, l.open_at"
    found = sql.each(db, sql.rows(db, "id"), "webhooks w CROSS JOIN lanes l", columns, late, alias="l")
    return f"SELECT {columns} {found}"


def bring_forward(db: Database, rules: Rules, deliveries: Sequence[Misdated], late_lanes: Sequence[Misdated]) -> int:
    """Set the times of these as they should be, unless they have changed; returns of how many. Inside a unit of work.

    What waits is due now, and a lease ends in a lease. A lane in which a delivery is being made in order stays closed
    for a lease at most.
    """
    now = stored_time(clock.now())
    lost = stored_time(clock.now() + timedelta(seconds=rules.lease))
    moment = sql.moment(db)
    locks.limit_lock_waits(db)
    statement = f"""
        UPDATE deliveries SET next_attempt_at = CASE WHEN leased THEN {moment} ELSE {moment} END
        FROM {sql.rows(db, "id bigint", "due timestamptz")}
        WHERE delivery_id = given.id AND status = 'pending' AND next_attempt_at = given.due RETURNING webhook_id"""
    rows = db.execute_sql(statement, (lost, now, sql.parameter(deliveries))).fetchall()
    until = f"CASE WHEN {lanes.making_in_order_sql('lanes')} THEN {moment} ELSE {moment} END"
    statement = f"""
        UPDATE lanes SET due_at = {until}, open_at = {until} FROM {sql.rows(db, "id", "opens timestamptz")}
        WHERE webhook_id = given.id AND open_at = given.opens RETURNING webhook_id"""
    opened = db.execute_sql(statement, (lost, now, lost, now, sql.parameter(late_lanes))).fetchall()
    make_due(db, {webhook_id for (webhook_id,) in rows})
    return len(rows) + len(opened)


def _limits(rules: Rules) -> tuple[str, str, str]:
    """Now, what is ahead of every clock, and what is ahead of every lease."""
    now = clock.now()
    ahead, of_leases = now + timedelta(seconds=JUMP), now + timedelta(seconds=rules.lease + SKEW)
    return stored_time(now), stored_time(ahead), stored_time(of_leases)


def _longest(db: Database, rules: Rules) -> str:
    """Seconds from the start of an attempt of webhook `w` to the next one, at most."""
    own = "(SELECT max(value) FROM json_each(w.retry_schedule))"
    if is_postgres(db):
        own = "(SELECT max(value::float) FROM json_array_elements_text(w.retry_schedule::json))"
    step = f"coalesce({own}, {float(max(rules.retry_schedule, default=0))}) * {1 + policy.JITTER}"
    return f"({sql.later(db, step, str(policy.MAX_RETRY_AFTER))} + {rules.lease + JUMP})"
