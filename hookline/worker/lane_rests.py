"""How long a lane rests: what follows from attempts, and from changes that remove what it rests for.

Every function runs inside one unit of work. Who settles an attempt may have begun it before its webhook was changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from peewee import Database

from hookline import clock
from hookline.lanes import in_order_sql
from hookline.store import sql
from hookline.tables import read_time, stored_time

if TYPE_CHECKING:
    from hookline.worker.jobs import Job, Settled


class Endpoint(NamedTuple):
    """What a webhook is by now, and whether the delivery still waits: who settles may have begun before a change."""

    url: str
    headers: str | None
    ordered: bool
    rate_limit: float | None
    waits: bool

    def is_another(self, job: Job) -> bool:
        return (self.url, self.headers) != (job.url, job.headers)


@dataclass
class Change:
    """Of a lane. `opens`: None is at once. `closed`: until when it was closed for the delivery that changes it."""

    due: datetime
    opens: datetime | None
    failures: int
    closed: str | None
    is_asked: bool  # did the endpoint say when to come again?


def settle(db: Database, settled: Sequence[Settled], now: str) -> list[Settled]:
    """Change the lanes of what is tried again, and those that were closed for an attempt. Most need no change.

    Returns the failures of endpoints that are still those of their webhooks.
    """
    concerned = [one for one in settled if one.job.exclusive or not one.is_success]
    if not concerned:
        return []
    found = _endpoints(db, concerned)
    _put_in_the_queue(db, concerned, found)
    changes = [
        (webhook_id, stored_time(one.due), one.opens and stored_time(one.opens), one.failures, one.closed)
        for webhook_id, one in _lanes_after(settled, found, clock.now()).items()
    ]
    db.execute_sql(lanes_sql(db), (sql.parameter(changes), now))
    known = [one for one in concerned if not one.is_success and one.job.delivery_id in found]
    return [one for one in known if not found[one.job.delivery_id].is_another(one.job)]


def _endpoints(db: Database, settled: Sequence[Settled]) -> dict[int, Endpoint]:
    """By delivery."""
    select = (
        "SELECT d.delivery_id, w.url, w.headers, w.ordered, w.rate_limit, d.status = 'pending' "
        f"FROM {sql.rows(db, 'id bigint')} CROSS JOIN deliveries d CROSS JOIN webhooks w "
        "WHERE d.delivery_id = given.id AND w.webhook_id = d.webhook_id"
    )
    rows = db.execute_sql(select, (sql.ids(one.job.delivery_id for one in settled),)).fetchall()
    return {delivery_id: Endpoint(*rest) for delivery_id, *rest in rows}


def _put_in_the_queue(db: Database, settled: Sequence[Settled], found: Mapping[int, Endpoint]) -> None:
    """Give those that kept strict order, which has been ended meanwhile, the time of their next attempt."""
    due = [
        (job.delivery_id, stored_time(settlement.next_attempt_at))
        for job, _, settlement in settled
        if job.ordered
        and settlement.next_attempt_at
        and job.delivery_id in found
        and not found[job.delivery_id].ordered
    ]
    if due:
        statement = f"""
            UPDATE deliveries SET next_attempt_at = given.due FROM {sql.rows(db, "id bigint", "due timestamptz")}
            WHERE delivery_id = given.id AND status = 'pending' AND NOT leased AND {in_order_sql("deliveries")}"""
        db.execute_sql(statement, (sql.parameter(due),))


def _lanes_after(settled: Iterable[Settled], found: Mapping[int, Endpoint], now: datetime) -> dict[str, Change]:
    """By webhook. What was sent while the lane was closed for it comes first: it says what becomes of the lane.

    Of the others a failure rests the lane, and a success opens it again, but not before the endpoint asked for.
    """
    changes: dict[str, Change] = {}
    for one in sorted(settled, key=lambda one: (not one.job.exclusive, one.job.closed_until or "")):
        job, before = one.job, changes.get(one.job.webhook_id)
        if job.exclusive or not one.is_success:
            if (endpoint := found.get(job.delivery_id)) is None:
                continue
            change = _change_after(one, endpoint, now)
            if before is None or job.exclusive:
                changes[job.webhook_id] = change
            elif change.opens and (change.is_asked or before.closed is None):
                before.opens = before.due = max(before.opens or change.opens, change.opens)
                before.failures = max(before.failures, change.failures)
                before.is_asked |= change.is_asked
        elif before is not None and before.closed is None and not before.is_asked:
            before.opens, before.failures = None, 0  # it works again
    return changes


def _change_after(one: Settled, endpoint: Endpoint, now: datetime) -> Change:
    """What one attempt means for its lane, as far as it was made as it would be now."""
    job, result, settlement = one
    times: list[datetime | None] = []
    if endpoint.rate_limit and job.rate_limit and endpoint.rate_limit <= job.rate_limit:
        times.append(read_time(job.opens_at))
    if one.is_success or endpoint.is_another(job):
        failures = 0
    else:
        failures = job.failures + 1
        times.append(settlement.lane_opens_at)
        if job.ordered and endpoint.ordered and endpoint.waits:
            times.append(settlement.next_attempt_at)
    opens = max((time for time in times if time is not None), default=None)
    return Change(opens or now, opens, failures, job.closed_until, bool(failures and result.retry_after))


@lru_cache(maxsize=8)
def lanes_sql(db: Database) -> str:
    """A lane that rests is opened only by the delivery for which it was closed; a failure of another may prolong that.

    So neither what was begun before nor what is settled a second time opens a lane while another delivery is made, or
    before the endpoint has asked for.
    """
    rows = sql.rows(db, "id", "due timestamptz", "opens timestamptz", "failed integer", "closed timestamptz")
    sooner = sql.sooner(db, "lanes.due_at", "excluded.due_at")
    more = sql.later(db, "lanes.failures", "excluded.failures")
    longer = sql.later(db, "lanes.open_at", "excluded.open_at")
    closed_for_it = "EXISTS (SELECT 1 FROM changes c WHERE c.id = lanes.webhook_id AND c.closed = lanes.open_at)"
    opens = f"CASE WHEN {closed_for_it} THEN excluded.open_at ELSE {longer} END"
    return f"""
        WITH changes AS (
            SELECT given.id, due, opens, failed, closed
            FROM {rows} CROSS JOIN webhooks w WHERE w.webhook_id = given.id)
        INSERT INTO lanes (webhook_id, due_at, open_at, failures)
        SELECT id, due, opens, failed FROM changes WHERE TRUE ORDER BY id
        ON CONFLICT (webhook_id) DO UPDATE SET
            failures = CASE WHEN excluded.failures = 0 THEN 0 ELSE {more} END,
            open_at = CASE WHEN excluded.open_at IS NULL THEN NULL ELSE {opens} END,
            due_at = CASE WHEN excluded.open_at IS NULL THEN {sooner} ELSE {opens} END
        WHERE NOT coalesce(lanes.open_at > {sql.moment(db)}, FALSE) OR excluded.failures > 0 OR {closed_for_it}"""
