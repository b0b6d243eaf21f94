"""The rows behind the worker: loading and claiming deliveries, settling them, and the lanes in which they wait.

Every function runs inside one unit of work. A lane is one webhook's queue: it is claimed as a whole, so a webhook that
hangs with 100,000 deliveries behind it costs one row here, and a few slots there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, events, policy, sql
from hookline.database import is_postgres
from hookline.policy import Outcome, Result, Rules, Settlement
from models import IN_ORDER, read_time, stored_time

LANES_AT_ONCE = 100
CANCELLED_AT_ONCE = 1000
DISABLED_EVENT = "webhook.disabled"
OF_WEBHOOKS = "webhook_id IN (SELECT id FROM {given}) AND status = 'pending'"
GONE = "the endpoint answered 410 Gone"


class Job(NamedTuple):
    """A delivery that this process has leased, with all that sending it takes."""

    delivery_id: int
    webhook_id: str
    event_id: str
    attempts: int
    attempts_before: int
    url: str
    secret: str
    previous_secret: str | None
    previous_secret_expires_at: Any
    headers: str | None
    retry_schedule: str | None
    ordered: bool
    event_type: str
    body: bytes
    event_time: str  # the `timestamp` in the body
    leased_at: float  # of time.monotonic()
    failures: int = 0  # of its lane, in a row
    closed_until: str | None = None  # the lane, for this delivery alone
    opens_at: str | None = None  # the lane, by its rate limit

    @property
    def exclusive(self) -> bool:
        """Is the lane closed until it is settled?"""
        return self.closed_until is not None

    def own_headers(self) -> dict[str, str]:
        return dict(json.loads(self.headers)) if self.headers else {}

    def own_schedule(self) -> tuple[float, ...]:
        return tuple(json.loads(self.retry_schedule)) if self.retry_schedule else ()


class Settled(NamedTuple):
    job: Job
    result: Result
    settlement: Settlement

    @property
    def is_success(self) -> bool:
        return self.settlement.outcome is Outcome.SUCCEEDED


def load(
    db: Database,
    leased: Sequence[tuple[int, str]],
    since: float,
    lanes: Mapping[str, tuple[int, str | None, str | None]] | None = None,
) -> list[Job]:
    """The jobs of these deliveries (id, end of the lease), as far as they are committed and still leased.

    `since`: when the leases began, of time.monotonic(). `lanes`: for each webhook the last three fields of its jobs.
    """
    found = db.execute_sql(load_sql(db), (sql.parameter(leased), IN_ORDER)).fetchall()
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
        SELECT d.delivery_id, d.webhook_id, d.event_id, d.attempts, d.attempts_before, w.url, w.secret,
               w.previous_secret, w.previous_secret_expires_at, w.headers, w.retry_schedule, w.ordered
        FROM {sql.rows(db, "id bigint", "until timestamptz")}
        CROSS JOIN deliveries d CROSS JOIN webhooks w
        WHERE d.delivery_id = given.id AND w.webhook_id = d.webhook_id AND w.enabled
              AND d.status = 'pending' AND d.leased AND d.next_attempt_at IN (given.until, {sql.moment(db)})
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
    due = db.execute_sql(due_sql(db, sql.skip_locked(db, "l")), given).fetchall()
    if not due:  # others hold all that are due, perhaps who publishes to them without pause: stand in line for one
        sql.wait_briefly(db)
        due = db.execute_sql(due_sql(db, sql.locked(db, "l"), at_once=1), given).fetchall()
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
            ORDER BY next_attempt_at, delivery_id LIMIT {db.param}{sql.skip_locked(db, "deliveries")})
        UPDATE deliveries SET leased = TRUE,
               next_attempt_at = {moment}
        WHERE delivery_id IN (SELECT delivery_id FROM due) AND status = 'pending'
        RETURNING delivery_id"""
    parameters = (webhook_id, now, budget, IN_ORDER if ordered else lost)
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
            LIMIT {CANCELLED_AT_ONCE}{sql.skip_locked(db, "deliveries")})
        UPDATE deliveries SET status = 'cancelled', leased = FALSE, next_attempt_at = NULL,
               finished_at = {sql.moment(db)}, last_error = 'the webhook was disabled'
        WHERE delivery_id IN (SELECT delivery_id FROM batch) AND status = 'pending'
        RETURNING delivery_id"""
    cancelled = db.execute_sql(statement, (webhook_id, stored_time(now))).fetchall()
    _move_on(db, webhook_id, now, None, more=len(cancelled) == CANCELLED_AT_ONCE)


def settle(db: Database, settled: Sequence[Settled], delinquent_since: str, only_free: bool = False) -> list[Settled]:
    """Record these attempts and what follows from them: deliveries, counters, lanes, webhooks to disable.

    A webhook that has failed everything since `delinquent_since` is disabled. With `only_free` those whose webhook
    somebody else holds are left out, and returned. Waits but briefly: then it fails, with LOCKED.
    """
    now = stored_time(clock.now())
    sql.wait_briefly(db)
    held = sql.lock_webhooks(db, {one.job.webhook_id for one in settled}, free=only_free)
    left = [one for one in settled if one.job.webhook_id in held]
    if left:
        settled = [one for one in settled if one.job.webhook_id not in held]
    if any(one.job.attempts for one in settled):
        _keep_earlier_attempts(db, settled)
    rows = db.execute_sql(settle_sql(db), (sql.parameter(_settled_row(one, now) for one in settled),)).fetchall()
    recorded = {delivery_id for (delivery_id,) in rows}  # the others were settled before, or given up
    counts = _counts(one for one in settled if one.job.delivery_id in recorded)
    db.execute_sql(count_sql(db), (sql.parameter(counts),))
    if lanes := _lanes_after(settled, now):
        db.execute_sql(lanes_sql(db), (sql.parameter(lanes), now))
    failed = {one.job.webhook_id for one in settled if not one.is_success}
    if failed:
        gone = {one.job.webhook_id for one in settled if one.settlement.outcome is Outcome.GONE}
        disable(db, gone, GONE, now)
        disable(db, failed - gone, "every attempt has failed for too long", now, delinquent_since)
    return left


def _keep_earlier_attempts(db: Database, settled: Sequence[Settled]) -> None:
    columns = "started_at, duration_ms, status_code, error, response"
    latest = ", ".join(f"d.last_{name}" for name in columns.split(", "))
    statement = f"""
        INSERT INTO attempts (delivery_id, number, {columns}) SELECT d.delivery_id, d.attempts, {latest}
        FROM {sql.rows(db, "id bigint", "attempts integer")} CROSS JOIN deliveries d
        WHERE d.delivery_id = given.id AND d.attempts = given.attempts AND d.last_started_at IS NOT NULL
        ON CONFLICT (delivery_id, number) DO NOTHING"""
    rows = [(one.job.delivery_id, one.job.attempts) for one in settled if one.job.attempts]
    db.execute_sql(statement, (sql.parameter(rows),))


@lru_cache(maxsize=8)
def settle_sql(db: Database) -> str:
    """Leaves `pending`, or `cancelled` where the attempt that was under way did arrive."""
    columns = (
        "id bigint",
        "attempts_made integer",
        "outcome",
        "due timestamptz",
        "ended timestamptz",
        "started timestamptz",
        "duration integer",
        "code integer",
        "problem",
        "answer",
    )
    return f"""
        UPDATE deliveries SET status = given.outcome, leased = FALSE, attempts = given.attempts_made + 1,
               next_attempt_at = given.due, finished_at = given.ended, last_started_at = given.started,
               last_duration_ms = given.duration, last_status_code = given.code, last_error = given.problem,
               last_response = given.answer
        FROM {sql.rows(db, *columns)}
        WHERE delivery_id = given.id AND attempts = given.attempts_made
              AND (status = 'pending' OR status = 'cancelled' AND given.outcome = 'succeeded')
        RETURNING delivery_id"""


def _settled_row(one: Settled, now: str) -> tuple[Any, ...]:
    job, result, settlement = one
    due = settlement.next_attempt_at and (IN_ORDER if job.ordered else stored_time(settlement.next_attempt_at))
    return (
        job.delivery_id,
        job.attempts,
        settlement.status,
        due,
        None if due else now,
        stored_time(result.started_at),
        result.duration_ms,
        result.status_code,
        result.error,
        result.response,
    )


@lru_cache(maxsize=8)
def count_sql(db: Database) -> str:
    columns = ("id", "calls integer", "failed integer", "success timestamptz", "failure timestamptz")
    rows = sql.rows(db, *columns, "recovered boolean", "failing timestamptz")
    return f"""
        UPDATE webhooks SET total_calls = total_calls + given.calls, failed_calls = failed_calls + given.failed,
               last_success = coalesce(given.success, last_success),
               last_failure = coalesce(given.failure, last_failure),
               failing_since = CASE WHEN given.recovered THEN given.failing
                                    ELSE coalesce(failing_since, given.failing) END
        FROM {rows} WHERE webhook_id = given.id"""


def _counts(settled: Iterable[Settled]) -> list[list[Any]]:
    """For each webhook: its calls, those failed, the last success and failure, and since when it fails, if it does."""
    found: dict[str, list[Any]] = {}
    for job, result, settlement in settled:
        counts = found.setdefault(job.webhook_id, [job.webhook_id, 0, 0, None, None, False, None])
        started = result.started_at
        counts[1] += 1
        if settlement.outcome is Outcome.SUCCEEDED:
            counts[3], counts[5], counts[6] = started, True, None
        else:
            counts[2] += 1
            counts[4], counts[6] = started, counts[6] or started
    return [[stored_time(one) if isinstance(one, datetime) else one for one in counts] for counts in found.values()]


@lru_cache(maxsize=8)
def lanes_sql(db: Database) -> str:
    """With strict order a lane that rests is changed only by the delivery for which it was closed.

    So neither what was begun before, nor what is settled a second time, opens it while another one is made.
    """
    rows = sql.rows(db, "id", "due timestamptz", "opens timestamptz", "failed integer", "closed timestamptz")
    sooner = sql.sooner(db, "lanes.due_at", "excluded.due_at")
    more = sql.later(db, "lanes.failures", "excluded.failures")
    return f"""
        WITH changes AS (
            SELECT given.id, due, opens, failed, closed, coalesce(w.ordered, FALSE) AS in_order
            FROM {rows} CROSS JOIN webhooks w WHERE w.webhook_id = given.id)
        INSERT INTO lanes (webhook_id, due_at, open_at, failures)
        SELECT id, due, opens, failed FROM changes WHERE TRUE ORDER BY id
        ON CONFLICT (webhook_id) DO UPDATE SET open_at = excluded.open_at,
            failures = CASE WHEN excluded.failures = 0 THEN 0 ELSE {more} END,
            due_at = CASE WHEN excluded.open_at IS NULL THEN {sooner} ELSE excluded.due_at END
        WHERE NOT coalesce(lanes.open_at > {sql.moment(db)}, FALSE) OR NOT EXISTS (
            SELECT 1 FROM changes c WHERE c.id = lanes.webhook_id AND c.in_order
            AND (c.closed IS NULL OR c.closed <> lanes.open_at))"""


def _lanes_after(settled: Iterable[Settled], now: str) -> list[list[Any]]:
    """The lanes to change: of what is tried again, and those that were closed for the attempt. Most need none."""
    found: dict[str, list[Any]] = {}
    for job, _, settlement in sorted(settled, key=lambda one: not one.job.exclusive):
        before = found.get(job.webhook_id)
        if before is not None and before[4] is not None and not job.exclusive:
            continue  # the lane was closed for another one, whose result says what becomes of it
        failed = settlement.outcome is not Outcome.SUCCEEDED
        if not failed and not job.exclusive:
            if before is not None:
                before[2:4] = [None, 0]  # it works again
            continue
        times = [settlement.lane_opens_at, settlement.next_attempt_at if job.ordered else None, read_time(job.opens_at)]
        latest = max((one for one in times if one is not None), default=None)
        opens = None if latest is None else stored_time(latest)
        failures = job.failures + 1 if failed else 0
        found[job.webhook_id] = [job.webhook_id, opens or now, opens, failures, job.closed_until]
    return list(found.values())


def disable(db: Database, ids: Iterable[str], reason: str, now: str, failing_since: str | None = None) -> list[str]:
    """Disable those of these webhooks that are enabled (and have failed since then); tell whoever listens."""
    wanted = sorted(ids)
    if not wanted:
        return []
    also = f" AND failing_since <= {sql.moment(db)}" if failing_since else ""
    statement = (
        f"UPDATE webhooks SET enabled = FALSE, disabled_at = {sql.moment(db)}, disabled_reason = {db.param} "
        f"WHERE enabled AND webhook_id IN (SELECT id FROM {sql.rows(db, 'id')}){also} RETURNING webhook_id"
    )
    parameters = [now, reason, sql.ids(wanted), *([failing_since] if failing_since else [])]
    disabled = [row[0] for row in db.execute_sql(statement, parameters).fetchall()]
    if disabled:
        events.queue(db, OF_WEBHOOKS, sql.ids(disabled), open_now=True)
        news = [events.NewEvent(DISABLED_EVENT, {"webhook_id": one, "reason": reason}) for one in disabled]
        events.publish_all(db, news)
    return disabled


def release(db: Database, delivery_ids: Sequence[int]) -> None:
    """Give leases back, to be sent by another worker at once."""
    now = stored_time(clock.now())
    given = f"delivery_id IN (SELECT id FROM {sql.rows(db, 'id bigint')}) AND status = 'pending' AND leased"
    moment = sql.moment(db)
    statement = f"""
        UPDATE deliveries SET leased = FALSE,
               next_attempt_at = CASE WHEN next_attempt_at = {moment} THEN next_attempt_at ELSE {moment} END
        WHERE {given} RETURNING webhook_id"""
    rows = db.execute_sql(statement, (IN_ORDER, now, sql.ids(delivery_ids))).fetchall()
    if rows:
        events.queue(db, OF_WEBHOOKS, sql.ids({webhook_id for (webhook_id,) in rows}), open_now=True)
