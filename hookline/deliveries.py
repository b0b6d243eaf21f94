"""Deliveries: their log with all attempts, retrying and cancelling them, and the reason why each waits.

Every function is one unit of work on the given database, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from peewee import JOIN, Database

from hookline import clock, lanes
from hookline.errors import Conflict, NotFound
from hookline.store import sql
from hookline.store.units import connected, transaction
from hookline.tables import Attempt, Delivery, Event, Lane, Status, Webhook, read_time, stored_time

COLUMNS = [
    Delivery.delivery_id,
    Delivery.webhook.alias("webhook_id"),
    Delivery.event.alias("event_id"),
    Event.event_type,
    Delivery.status,
    Delivery.attempts,
    Delivery.next_attempt_at,
    Delivery.created_at,
    Delivery.finished_at,
    Delivery.last_started_at,
    Delivery.last_duration_ms,
    Delivery.last_status_code,
    Delivery.last_error,
    Delivery.last_response,
    Delivery.reason,
    Delivery.leased,
    Webhook.ordered,
    Webhook.enabled,
    Lane.open_at,
    Lane.failures,
]
DUE_LANES = 100  # looked at for the oldest delivery that is due
BY_REQUEST = "cancelled by request"
FINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)

Row = dict[str, Any]


class WaitsFor(StrEnum):
    """The reason why a pending delivery waits."""

    CANCELLATION = "nothing: its webhook is disabled, it is about to be cancelled"
    ANSWER = "nothing: it is being made right now"
    ORDER = "order: the delivery before it has not ended"
    ENDPOINT = "back-off: the endpoint fails"
    RATE_LIMIT = "rate limit"
    NEXT_ATTEMPT = "back-off: its next attempt"
    TURN = "its turn"


class Inserted(NamedTuple):
    """A new delivery."""

    delivery_id: int
    webhook_id: str
    event_id: str
    leased: bool


def page(
    db: Database,
    *,
    webhook_id: str | None = None,
    event_id: str | None = None,
    status: str | None = None,
    limit: int = 50,
    before: int | None = None,
) -> list[Row]:
    """At most `limit` deliveries, newest first, from the one behind `before` (its id). Raises Unavailable."""
    query = _query().order_by(Delivery.delivery_id.desc()).limit(limit)
    if webhook_id is not None:
        query = query.where(Delivery.webhook == webhook_id)
    if event_id is not None:
        query = query.where(Delivery.event == event_id)
    if status is not None:
        query = query.where(Delivery.status == status)
    if before is not None:
        query = query.where(Delivery.delivery_id < before)
    with connected(db):
        rows = list(query.dicts().bind(db).execute())
        return [_shown(db, row) for row in rows]


def get(db: Database, delivery_id: int) -> Row:
    """One delivery, with its `attempt_log`, oldest first. Raises NotFound, Unavailable."""
    with connected(db):
        row = _row(db, delivery_id)
        attempts = Attempt.select().where(Attempt.delivery == delivery_id).order_by(Attempt.number).dicts().bind(db)
        log = [_attempt(attempt["number"], attempt) for attempt in attempts.execute()]
        if row["last_started_at"] is not None:
            latest = {name.removeprefix("last_"): row[name] for name in row if name.startswith("last_")}
            log.append(_attempt(row["attempts"], latest))
        return {**_shown(db, row), "attempt_log": log}


def retry(db: Database, delivery_id: int) -> Row:
    """Make this delivery due now, whatever became of it. Raises NotFound, Conflict, Unavailable.

    If it had ended its retry schedule starts anew.
    """
    now = clock.now()
    with transaction(db):
        row = _row(db, delivery_id)
        if not row["enabled"]:
            raise Conflict("the webhook is disabled: enable it first")
        if _is_being_made(row, now):
            raise Conflict("this delivery is being made right now")
        due = read_time(lanes.next_attempt_at(row["ordered"], stored_time(now)))
        values = {"status": Status.PENDING, "leased": False, "next_attempt_at": due}
        if row["status"] in FINAL:
            values["attempts_before"] = Delivery.attempts
        _change(db, row, {**values, "finished_at": None, "reason": None})
        lanes.open_lanes(db, [row["webhook_id"]], now=True)
        return get(db, delivery_id)


def cancel(db: Database, delivery_id: int) -> Row:
    """Give this delivery up. Raises NotFound, Conflict, Unavailable.

    If it is being made right now and arrives, it has succeeded all the same; if not, its log tells of the attempt. With
    strict order the next one is made now, or once this attempt has ended.
    """
    with transaction(db):
        row = _row(db, delivery_id)
        if row["status"] == Status.CANCELLED:
            raise Conflict("this delivery is cancelled already")
        if row["status"] != Status.PENDING:
            raise Conflict(f"this delivery has {row['status']} already")
        now = clock.now()
        is_waited_for = row["ordered"] and not _is_being_made(row, now) and not _is_behind_another(db, row)
        reason = f"{BY_REQUEST}; before that: {row['last_error']}" if row["last_error"] else BY_REQUEST
        values = {"status": Status.CANCELLED, "leased": False, "next_attempt_at": None}
        _change(db, row, {**values, "finished_at": now, "reason": reason})
        if is_waited_for:
            lanes.open_now(db, row["webhook_id"])
        return get(db, delivery_id)


def insert(db: Database, webhook_id: str, event_ids: Collection[str], now: str) -> list[Inserted]:
    """Insert deliveries of these events to one webhook, unless there are any, in the order of time; returns the new.

    They are not leased. Inside a unit of work.
    """
    if not event_ids:
        return []
    values = {"webhook_id": webhook_id, "event_ids": sql.encoded_ids(event_ids), "now": now}
    return [Inserted(*row) for row in db.execute_sql(_insert_sql(db), values).fetchall()]


def restart(db: Database, delivery_ids: Collection[int], statuses: Iterable[str], now: str) -> list[int]:
    """Make these due, from the start of their schedule, if they have one of these statuses; returns their ids.

    Inside a unit of work.
    """
    if not delivery_ids:
        return []
    allowed = ", ".join(f"'{Status(status)}'" for status in statuses)
    ordered = "(SELECT w.ordered FROM webhooks w WHERE w.webhook_id = deliveries.webhook_id)"
    statement = f"""
        UPDATE deliveries SET status = 'pending', leased = FALSE, finished_at = NULL, attempts_before = attempts,
               reason = NULL, next_attempt_at = {lanes.next_attempt_sql(ordered, sql.time(db, "now"))}
        WHERE delivery_id IN (SELECT id FROM {sql.values(db, "delivery_ids", "id bigint")}) AND status IN ({allowed})
        RETURNING delivery_id"""
    values = {"now": now, "delivery_ids": sql.encoded_ids(delivery_ids)}
    return [delivery_id for (delivery_id,) in db.execute_sql(statement, values).fetchall()]


def oldest_due(db: Database) -> float:
    """For how many seconds the delivery has been due that has waited longest in a due lane; 0 if none is.

    Looks at the lanes that have been due for longest. Raises Unavailable.
    """
    now = clock.now()
    statement = f"""
        SELECT min((
            SELECT CASE WHEN {lanes.in_order_sql("d")} THEN d.created_at ELSE d.next_attempt_at END FROM deliveries d
            WHERE d.webhook_id = l.webhook_id AND d.status = 'pending' ORDER BY d.next_attempt_at LIMIT 1))
        FROM (
            SELECT webhook_id FROM lanes WHERE due_at <= {sql.time(db, "now")}
            ORDER BY due_at LIMIT {DUE_LANES}) AS l"""
    with connected(db):
        oldest = read_time(db.execute_sql(statement, {"now": stored_time(now)}).fetchone()[0])
    return max((now - oldest).total_seconds(), 0.0) if oldest is not None else 0.0


@lru_cache(maxsize=8)
def _insert_sql(db: Database) -> str:
    now = sql.time(db, "now")
    return f"""
        INSERT INTO deliveries (webhook_id, event_id, leased, next_attempt_at, created_at)
        SELECT w.webhook_id, e.event_id, FALSE, {lanes.next_attempt_sql("w.ordered", now)}, {now}
        FROM {sql.values(db, "event_ids", "id")} CROSS JOIN events e CROSS JOIN webhooks w
        WHERE e.event_id = event_ids.id AND w.webhook_id = {sql.param(db, "webhook_id")}
        ORDER BY e.created_at, e.event_id
        ON CONFLICT (event_id, webhook_id) DO NOTHING RETURNING delivery_id, webhook_id, event_id, leased"""


def _query() -> Any:
    return (
        Delivery.select(*COLUMNS)
        .join(Event, on=(Event.event_id == Delivery.event))
        .join(Webhook, on=(Webhook.webhook_id == Delivery.webhook))
        .join(Lane, JOIN.LEFT_OUTER, on=(Lane.webhook == Delivery.webhook))
    )


def _row(db: Database, delivery_id: int) -> Row:
    rows = list(_query().where(Delivery.delivery_id == delivery_id).dicts().bind(db).execute())
    if not rows:
        raise NotFound("Delivery not found")
    return dict(rows[0])


def _change(db: Database, row: Row, values: Row) -> None:
    """Change a delivery if it still is as it was read."""
    due = row["next_attempt_at"]
    same = (
        Delivery.delivery_id == row["delivery_id"],
        Delivery.status == row["status"],
        Delivery.attempts == row["attempts"],
        Delivery.leased == row["leased"],
        Delivery.next_attempt_at.is_null() if due is None else Delivery.next_attempt_at == due,
    )
    if not Delivery.update(values).where(*same).execute(db):
        raise Conflict("this delivery has just changed: look again")


def _is_being_made(row: Row, now: datetime) -> bool:
    lease_end = row["open_at"] if lanes.is_in_order(row["next_attempt_at"]) else row["next_attempt_at"]
    return bool(row["status"] == Status.PENDING and row["leased"] and lease_end is not None and lease_end > now)


def _shown(db: Database, row: Row) -> Row:
    waits_for, until = _waiting(db, row)
    return {
        "delivery_id": row["delivery_id"],
        "webhook_id": row["webhook_id"],
        "event_id": row["event_id"],
        "event_type": row["event_type"],
        "status": row["status"],
        "attempts": row["attempts"],
        "next_attempt_at": until,
        "waiting_for": waits_for and waits_for.value,
        "reason": row["reason"] or row["last_error"] if row["status"] in (Status.FAILED, Status.CANCELLED) else None,
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
    }


def _waiting(db: Database, row: Row) -> tuple[WaitsFor | None, datetime | None]:
    """The reason why a delivery waits, and until when."""
    now = clock.now()
    due, opens = row["next_attempt_at"], row["open_at"]
    if row["status"] != Status.PENDING:
        return None, None
    if not row["enabled"]:
        return WaitsFor.CANCELLATION, None
    if _is_being_made(row, now):
        return WaitsFor.ANSWER, None
    if row["ordered"] and _is_behind_another(db, row):
        return WaitsFor.ORDER, None
    if opens is not None and opens > now:
        return (WaitsFor.ENDPOINT if row["failures"] else WaitsFor.RATE_LIMIT), max(opens, due)
    if due > now:
        return WaitsFor.NEXT_ATTEMPT, due
    return WaitsFor.TURN, max(due, row["created_at"])


def _is_behind_another(db: Database, row: Row) -> bool:
    waiting = Delivery.select(Delivery.delivery_id)
    waiting = waiting.where(Delivery.webhook == row["webhook_id"], Delivery.status == Status.PENDING)
    first = waiting.order_by(Delivery.next_attempt_at, Delivery.delivery_id).limit(1)  # as they are claimed
    return bool(first.scalar(db) != row["delivery_id"])


def _attempt(number: int, columns: Row) -> Row:
    names = ("started_at", "duration_ms", "status_code", "error", "response")
    return {"number": number, **{name: columns[name] for name in names}}
