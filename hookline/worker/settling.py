"""Settle attempts: record them, count them, change their lanes, disable webhooks. Decisions are made before, in policy.

Every function runs inside one unit of work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

from peewee import Database

from hookline import clock, events, lanes
from hookline.store import locks, sql
from hookline.tables import stored_time
from hookline.worker import attempt_log, lane_rests
from hookline.worker.attempt_log import Attempted
from hookline.worker.jobs import Settled

DISABLED_EVENT = f"{events.OWN}webhook.disabled"
GONE = "the endpoint answered 410 Gone"
DELINQUENT = "every attempt has failed for too long"


class Outcomes(NamedTuple):
    """The jobs that `settle` left out, those whose delivery has failed for good, and why webhooks were disabled."""

    blocked: list[Settled]
    failed: list[Settled]
    disabled: dict[str, str]


def settle(db: Database, batch: Sequence[Settled], delinquent_since: str, skip_blocked: bool = False) -> Outcomes:
    """Write what these attempts have decided, and disable webhooks that have failed all since `delinquent_since`.

    Counters take only attempts that are recorded for the first time: one whose commit's answer was lost is settled
    again, and would count twice. Lanes take all: one that was closed for a job must open though its attempt is in the
    log already, and opening it twice changes nothing (see `lane_rests.lanes_sql`).

    Fails with LOCKED after a short wait for a webhook that others lock; with `skip_blocked` such ones are left out.
    """
    now = stored_time(clock.now())
    locks.limit_lock_waits(db)
    blocked_ids = locks.lock_webhooks(db, {settled.job.webhook_id for settled in batch}, skip_blocked=skip_blocked)
    blocked = [settled for settled in batch if settled.job.webhook_id in blocked_ids]
    if blocked:
        batch = [settled for settled in batch if settled.job.webhook_id not in blocked_ids]
    recorded = attempt_log.record(db, [_attempted(settled, now) for settled in batch])
    known = [(settled, recorded[settled.job.delivery_id]) for settled in batch if settled.job.delivery_id in recorded]
    counts = _counts(settled for settled, result in known if result.is_new)
    db.execute_sql(count_sql(db), {"counts": sql.encoded(counts)})
    failures = lane_rests.settle(db, batch, now)
    final = [settled for settled, result in known if settled.settlement.status == result.status == "failed"]
    return Outcomes(blocked, final, _disable(db, failures, now, delinquent_since) if failures else {})


def _attempted(settled: Settled, now: str) -> Attempted:
    job, result, settlement = settled
    due_at = settlement.next_attempt_at and stored_time(settlement.next_attempt_at)
    return Attempted(
        delivery_id=job.delivery_id,
        attempts_made=job.attempts,
        status=settlement.status,
        next_attempt_at=lanes.next_attempt_at(job.ordered, due_at) if due_at else None,
        finished_at=None if due_at else now,
        started_at=_started_at(settled),
        duration_ms=result.duration_ms,
        status_code=result.status_code,
        error=result.error,
        response=result.response,
    )


class WebhookCounts(NamedTuple):
    """The change of a webhook's counters by the attempts of a batch. Times are stored times."""

    webhook_id: str
    calls: int
    failed_calls: int
    last_success: str | None
    last_failure: str | None
    failing_since: str | None  # after its last success


COUNTS_COLUMNS = (
    "webhook_id",
    "calls integer",
    "failed_calls integer",
    "last_success timestamptz",
    "last_failure timestamptz",
    "failing_since timestamptz",
)


def _counts(batch: Iterable[Settled]) -> list[WebhookCounts]:
    by_webhook: dict[str, list[Settled]] = {}
    for settled in batch:
        by_webhook.setdefault(settled.job.webhook_id, []).append(settled)
    return [_counts_of(webhook_id, attempts) for webhook_id, attempts in by_webhook.items()]


def _counts_of(webhook_id: str, attempts: Sequence[Settled]) -> WebhookCounts:
    failures = [settled for settled in attempts if settled.settlement.counts_as_failure]
    successes = [settled for settled in attempts if not settled.settlement.counts_as_failure]
    since_success = list(takewhile(lambda settled: settled.settlement.counts_as_failure, reversed(attempts)))
    return WebhookCounts(
        webhook_id,
        calls=len(attempts),
        failed_calls=len(failures),
        last_success=_started_at(successes[-1]) if successes else None,
        last_failure=_started_at(failures[-1]) if failures else None,
        failing_since=_started_at(since_success[-1]) if since_success else None,
    )


def _started_at(settled: Settled) -> str:
    return stored_time(settled.result.started_at)


@lru_cache(maxsize=8)
def count_sql(db: Database) -> str:
    return f"""
        UPDATE webhooks SET
            total_calls = webhooks.total_calls + counts.calls,
            failed_calls = webhooks.failed_calls + counts.failed_calls,
            last_success = coalesce(counts.last_success, webhooks.last_success),
            last_failure = coalesce(counts.last_failure, webhooks.last_failure),
            failing_since = CASE WHEN counts.last_success IS NOT NULL THEN counts.failing_since
                                 ELSE coalesce(webhooks.failing_since, counts.failing_since) END
        FROM {sql.values(db, "counts", *COUNTS_COLUMNS)}
        WHERE webhooks.webhook_id = counts.webhook_id"""


def _disable(db: Database, failures: Sequence[Settled], now: str, delinquent_since: str) -> dict[str, str]:
    """Disable the webhooks that are gone, and those that have failed all for too long; returns the reason of each."""
    gone = {settled.job.webhook_id for settled in failures if settled.settlement.disables}
    disabled = dict.fromkeys(disable(db, gone, GONE, now), GONE)
    others = {settled.job.webhook_id for settled in failures} - gone
    return disabled | dict.fromkeys(disable(db, others, DELINQUENT, now, delinquent_since), DELINQUENT)


def disable(
    db: Database, webhook_ids: Iterable[str], reason: str, now: str, failing_since: str | None = None
) -> list[str]:
    """Disable those of these webhooks that are enabled (and have failed all since then); returns and announces them."""
    ids = sorted(webhook_ids)
    if not ids:
        return []
    delinquent = f" AND failing_since <= {sql.time(db, 'failing_since')}" if failing_since else ""
    values = {"ids": sql.encoded_ids(ids), "now": now, "reason": reason, "failing_since": failing_since}
    statement = f"""
        UPDATE webhooks SET enabled = FALSE, disabled_at = {sql.time(db, "now")},
               disabled_reason = {sql.param(db, "reason")}
        WHERE enabled AND webhook_id IN (SELECT id FROM {sql.values(db, "ids", "id")}){delinquent}
        RETURNING webhook_id"""
    disabled = [webhook_id for (webhook_id,) in db.execute_sql(statement, values).fetchall()]
    if disabled:
        lanes.open_lanes(db, disabled, now=True)
        contents = [{"webhook_id": webhook_id, "reason": reason} for webhook_id in disabled]
        events.publish_all(db, [events.NewEvent(DISABLED_EVENT, content, own=True) for content in contents])
    return disabled
