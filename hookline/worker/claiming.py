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

from hookline import clock, events, lanes, policy, rotation
from hookline.policy import Outcome, Result, Rules, Settlement
from hookline.store import sql
from hookline.store.units import is_postgres
from hookline.worker import attempt_log, lane_rests
from models import IN_ORDER, read_time, stored_time

LANES_AT_ONCE = 100
CANCELLED_AT_ONCE = 1000
DISABLED_EVENT = f"{events.OWN}webhook.disabled"
GONE = "the endpoint answered 410 Gone"
DELINQUENT = "every attempt has failed for too long"
BY_DISABLING = "the webhook was disabled"


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
    earlier_secrets: str | None
    headers: str | None
    retry_schedule: str | None
    rate_limit: float | None
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

    def secrets(self, now: datetime) -> list[str]:
        """Those that sign, newest first."""
        kept = rotation.kept(self.previous_secret, self.previous_secret_expires_at, self.earlier_secrets, now)
        return [self.secret, *(secret for secret, _ in reversed(kept))]

    def own_headers(self) -> dict[str, str]:
        return dict(json.loads(self.headers)) if self.headers else {}

    def own_schedule(self) -> tuple[float, ...]:
        """Raises ValueError if it cannot be used."""
        steps = json.loads(self.retry_schedule) if self.retry_schedule else []
        if not isinstance(steps, list) or not policy.is_schedule(steps):
            raise ValueError("not a list of seconds")
        return tuple(steps)


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
        SELECT d.delivery_id, d.webhook_id, d.event_id, d.attempts, d.attempts_before, w.url,
               w.secret, w.previous_secret, w.previous_secret_expires_at, w.earlier_secrets,
               w.headers, w.retry_schedule, w.rate_limit, w.ordered
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
               finished_at = {sql.moment(db)}, reason = '{BY_DISABLING}'
        WHERE delivery_id IN (SELECT delivery_id FROM batch) AND status = 'pending'
        RETURNING delivery_id"""
    cancelled = db.execute_sql(statement, (webhook_id, stored_time(now))).fetchall()
    _move_on(db, webhook_id, now, None, more=len(cancelled) == CANCELLED_AT_ONCE)


class Outcomes(NamedTuple):
    """What `settle` did: those left out, those whose delivery has failed for good, and why webhooks were disabled."""

    left: list[Settled]
    failed: list[Settled]
    disabled: dict[str, str]


def settle(db: Database, settled: Sequence[Settled], delinquent_since: str, only_free: bool = False) -> Outcomes:
    """Record these attempts and what follows from them: deliveries, counters, lanes, webhooks to disable.

    A webhook that has failed everything since `delinquent_since` is disabled. With `only_free` those whose webhook
    somebody else holds are left out. Waits but briefly: then it fails, with LOCKED.
    """
    now = stored_time(clock.now())
    sql.wait_briefly(db)
    held = sql.lock_webhooks(db, {one.job.webhook_id for one in settled}, free=only_free)
    left = [one for one in settled if one.job.webhook_id in held]
    if left:
        settled = [one for one in settled if one.job.webhook_id not in held]
    found = attempt_log.record(db, [_settled_row(one, now) for one in settled])
    counts = _counts(one for one in settled if one.job.delivery_id in found and found[one.job.delivery_id].is_new)
    db.execute_sql(count_sql(db), (sql.parameter(counts),))
    failures = lane_rests.settle(db, settled, now)
    over = [one for one in settled if one.settlement.status == "failed" and one.job.delivery_id in found]
    final = [one for one in over if found[one.job.delivery_id].status == "failed"]
    return Outcomes(left, final, _disable(db, failures, now, delinquent_since) if failures else {})


def _disable(db: Database, failures: Sequence[Settled], now: str, delinquent_since: str) -> dict[str, str]:
    """Disable those that are gone, and those that have failed everything for too long; returns them with the reason."""
    gone = {one.job.webhook_id for one in failures if one.settlement.outcome is Outcome.GONE}
    disabled = dict.fromkeys(disable(db, gone, GONE, now), GONE)
    late = disable(db, {one.job.webhook_id for one in failures} - gone, DELINQUENT, now, delinquent_since)
    return disabled | dict.fromkeys(late, DELINQUENT)


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
        lanes.queue(db, lanes.OF_WEBHOOKS, sql.ids(disabled), open_now=True)
        news = [events.NewEvent(DISABLED_EVENT, {"webhook_id": one, "reason": reason}, own=True) for one in disabled]
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
        lanes.queue(db, lanes.OF_WEBHOOKS, sql.ids({webhook_id for (webhook_id,) in rows}), open_now=True)
