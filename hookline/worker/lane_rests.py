"""Set how long lanes rest after attempts. Every function runs inside one unit of work.

A job may have been claimed before its webhook was changed. Its attempt counts for the lane as far as it was made as it
would be made now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from peewee import Database

from hookline import clock
from hookline.lanes import in_order_sql
from hookline.store import sql
from hookline.tables import read_time, stored_time
from hookline.worker.jobs import Job, Settled


class Endpoint(NamedTuple):
    """The webhook of a delivery as it is now, and whether the delivery is still pending."""

    delivery_id: int
    url: str
    headers: str | None
    ordered: bool | None
    rate_limit: float | None
    is_pending: bool

    def is_another(self, job: Job) -> bool:
        return (self.url, self.headers) != (job.url, job.headers)


class LaneChange(NamedTuple):
    """The rest that the attempts of a batch give to a lane."""

    due_at: datetime
    opens_at: datetime | None  # None: at once
    failures: int
    closed_until: str | None  # for the job that changes it
    is_asked: bool  # by the endpoint, that it opens no earlier


def settle(db: Database, batch: Sequence[Settled], now: str) -> list[Settled]:
    """Change the lanes of deliveries that are tried again, and those that were closed for a job; most are neither.

    Returns the failures of endpoints that are still those of their webhooks.
    """
    concerned = [settled for settled in batch if settled.job.is_exclusive or settled.settlement.counts_as_failure]
    if not concerned:
        return []
    endpoints = _endpoints(db, concerned)
    _end_strict_order(db, concerned, endpoints)
    changes = [
        (
            webhook_id,
            stored_time(change.due_at),
            change.opens_at and stored_time(change.opens_at),
            change.failures,
            change.closed_until,
        )
        for webhook_id, change in _changes(batch, endpoints, clock.now()).items()
    ]
    db.execute_sql(lanes_sql(db), {"new_rests": sql.encoded(changes), "now": now})
    return [
        settled
        for settled in concerned
        if settled.settlement.counts_as_failure
        and (endpoint := endpoints.get(settled.job.delivery_id))
        and not endpoint.is_another(settled.job)
    ]


def _endpoints(db: Database, batch: Sequence[Settled]) -> dict[int, Endpoint]:
    """The endpoints by delivery_id, of deliveries that have not been deleted."""
    select = (
        "SELECT d.delivery_id, w.url, w.headers, w.ordered, w.rate_limit, d.status = 'pending' "
        f"FROM {sql.values(db, 'ids', 'id bigint')} CROSS JOIN deliveries d CROSS JOIN webhooks w "
        "WHERE d.delivery_id = ids.id AND w.webhook_id = d.webhook_id"
    )
    ids = sql.encoded_ids(settled.job.delivery_id for settled in batch)
    return {row[0]: Endpoint(*row) for row in db.execute_sql(select, {"ids": ids}).fetchall()}


def _end_strict_order(db: Database, batch: Sequence[Settled], endpoints: Mapping[int, Endpoint]) -> None:
    """Give deliveries whose webhook has left strict order meanwhile the time of their next attempt."""
    due = [
        (job.delivery_id, stored_time(settlement.next_attempt_at))
        for job, _, settlement in batch
        if job.ordered
        and settlement.next_attempt_at
        and (endpoint := endpoints.get(job.delivery_id))
        and not endpoint.ordered
    ]
    if due:
        statement = f"""
            UPDATE deliveries SET next_attempt_at = due.due_at
            FROM {sql.values(db, "due", "id bigint", "due_at timestamptz")}
            WHERE delivery_id = due.id AND status = 'pending' AND NOT leased AND {in_order_sql("deliveries")}"""
        db.execute_sql(statement, {"due": sql.encoded(due)})


def _changes(batch: Iterable[Settled], endpoints: Mapping[int, Endpoint], now: datetime) -> dict[str, LaneChange]:
    """The change of each lane, by webhook_id. A job for which the lane was closed comes first: it decides.

    Of the others a failure rests the lane, and a success opens it again, but not before the endpoint asked for.
    """
    changes: dict[str, LaneChange] = {}
    for settled in sorted(batch, key=_exclusive_first):
        job, before = settled.job, changes.get(settled.job.webhook_id)
        if job.is_exclusive or settled.settlement.counts_as_failure:
            if endpoint := endpoints.get(job.delivery_id):
                change = _change_after(settled, endpoint, now)
                changes[job.webhook_id] = change if before is None or job.is_exclusive else _longer(before, change)
        elif before is not None and before.closed_until is None and not before.is_asked:
            changes[job.webhook_id] = before._replace(opens_at=None, failures=0)  # it works again
    return changes


def _exclusive_first(settled: Settled) -> tuple[bool, str]:
    return not settled.job.is_exclusive, settled.job.lane.closed_until or ""


def _change_after(settled: Settled, endpoint: Endpoint, now: datetime) -> LaneChange:
    """The change by one attempt alone."""
    job, _, settlement = settled
    is_failure = settlement.counts_as_failure and not endpoint.is_another(job)
    times: list[datetime | None] = []
    if endpoint.rate_limit and job.rate_limit and endpoint.rate_limit <= job.rate_limit:
        times.append(read_time(job.lane.opens_at))
    if is_failure:
        times.append(settlement.lane_opens_at)
        if job.ordered and endpoint.ordered and endpoint.is_pending:
            times.append(settlement.next_attempt_at)
    opens_at = max((time for time in times if time is not None), default=None)
    return LaneChange(
        due_at=opens_at or now,
        opens_at=opens_at,
        failures=job.lane.failures + 1 if is_failure else 0,
        closed_until=job.lane.closed_until,
        is_asked=is_failure and settlement.is_asked,
    )


def _longer(before: LaneChange, change: LaneChange) -> LaneChange:
    """The change by both. A lane that was closed for a job rests longer only if the endpoint asks for it."""
    if change.opens_at is None or (before.closed_until is not None and not change.is_asked):
        return before
    opens_at = max(before.opens_at or change.opens_at, change.opens_at)
    return before._replace(
        due_at=opens_at,
        opens_at=opens_at,
        failures=max(before.failures, change.failures),
        is_asked=before.is_asked or change.is_asked,
    )


@lru_cache(maxsize=8)
def lanes_sql(db: Database) -> str:
    """A lane that rests is opened only by the job for which it was closed; a failure of another may prolong that.

    So neither a job from before nor one that is settled a second time opens a lane while another delivery is made, or
    before the endpoint has asked for.
    """
    columns = ("id", "due_at timestamptz", "open_at timestamptz", "failures integer", "closed_until timestamptz")
    sooner = sql.sooner(db, "lanes.due_at", "excluded.due_at")
    more = sql.later(db, "lanes.failures", "excluded.failures")
    longer = sql.later(db, "lanes.open_at", "excluded.open_at")
    closed_for_it = "EXISTS (SELECT 1 FROM changes c WHERE c.id = lanes.webhook_id AND c.closed_until = lanes.open_at)"
    opens = f"CASE WHEN {closed_for_it} THEN excluded.open_at ELSE {longer} END"
    return f"""
        WITH changes AS (
            SELECT new_rests.* FROM {sql.values(db, "new_rests", *columns)}
            CROSS JOIN webhooks w WHERE w.webhook_id = new_rests.id)
        INSERT INTO lanes (webhook_id, due_at, open_at, failures)
        SELECT id, due_at, open_at, failures FROM changes WHERE TRUE ORDER BY id
        ON CONFLICT (webhook_id) DO UPDATE SET
            failures = CASE WHEN excluded.failures = 0 THEN 0 ELSE {more} END,
            open_at = CASE WHEN excluded.open_at IS NULL THEN NULL ELSE {opens} END,
            due_at = CASE WHEN excluded.open_at IS NULL THEN {sooner} ELSE {opens} END
        WHERE NOT coalesce(lanes.open_at > {sql.time(db, "now")}, FALSE) OR excluded.failures > 0 OR {closed_for_it}"""
