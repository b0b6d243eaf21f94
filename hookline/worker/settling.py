"""Settle attempts: record them, count them, change their lanes, disable webhooks that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, events, lanes
from hookline.policy import Outcome
from hookline.store import locks, sql
from hookline.tables import stored_time
from hookline.worker import attempt_log, lane_rests
from hookline.worker.jobs import Settled

DISABLED_EVENT = f"{events.OWN}webhook.disabled"


GONE = "the endpoint answered 410 Gone"


DELINQUENT = "every attempt has failed for too long"


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
    locks.limit_lock_waits(db)
    held = locks.lock_webhooks(db, {one.job.webhook_id for one in settled}, skip_blocked=only_free)
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
    due = settlement.next_attempt_at and lanes.next_attempt_at(job.ordered, stored_time(settlement.next_attempt_at))
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
        lanes.open_lanes(db, disabled, now=True)
        news = [events.NewEvent(DISABLED_EVENT, {"webhook_id": one, "reason": reason}, own=True) for one in disabled]
        events.publish_all(db, news)
    return disabled
