"""The log of deliveries and attempts, and what one can do with a delivery: retry it, cancel it, ask what it waits for.

Every function is one unit of work on the given database.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

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
FINAL = (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)

Row = dict[str, Any]


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
        log = [_attempt(one["number"], one) for one in attempts.execute()]
        if row["last_started_at"] is not None:
            log.append(_attempt(row["attempts"], {name[5:]: row[name] for name in row if name.startswith("last_")}))
        return {**_shown(db, row), "attempt_log": log}


def retry(db: Database, delivery_id: int) -> Row:
    """Make this delivery due now, whatever became of it. Raises NotFound, Conflict, Unavailable.

    One that had ended starts its schedule anew.
    """
    now = clock.now()
    with transaction(db):
        row = _row(db, delivery_id)
        if not row["enabled"]:
            raise Conflict("the webhook is disabled: enable it first")
        if _is_under_way(row, now):
            raise Conflict("this delivery is being made right now")
        again = {"attempts_before": Delivery.attempts} if row["status"] in FINAL else {}
        due = read_time(lanes.next_attempt_at(row["ordered"], stored_time(now)))
        _move(db, row, status=Status.PENDING, leased=False, next_attempt_at=due, finished_at=None, reason=None, **again)
        lanes.open_lanes(db, [row["webhook_id"]], now=True)
        return get(db, delivery_id)


def cancel(db: Database, delivery_id: int) -> Row:
    """Give this delivery up. Raises NotFound, Conflict, Unavailable.

    If it is being made right now and arrives, it has succeeded all the same; if not, its log tells of the attempt. With
    strict order the next one is made now, or once this attempt has ended.
    """
    with transaction(db):
        row = _row(db, delivery_id)
        if row["status"] != Status.PENDING:
            raise Conflict(f"this delivery has {row['status']} already" if row["status"] != "cancelled" else GIVEN_UP)
        is_waited_for = row["ordered"] and not _is_under_way(row, clock.now()) and not _is_behind_another(db, row)
        before = f"; before that: {row['last_error']}" if row["last_error"] else ""
        reason = f"cancelled by request{before}"
        _move(
            db,
            row,
            status=Status.CANCELLED,
            leased=False,
            next_attempt_at=None,
            finished_at=clock.now(),
            reason=reason,
        )
        if is_waited_for:
            lanes.open_now(db, row["webhook_id"])
        return get(db, delivery_id)


GIVEN_UP = "this delivery is cancelled already"


def _query() -> Any:
    return (
        Delivery.select(*COLUMNS)
        .join(Event, on=(Event.event_id == Delivery.event))
        .join(Webhook, on=(Webhook.webhook_id == Delivery.webhook))
        .join(Lane, JOIN.LEFT_OUTER, on=(Lane.webhook == Delivery.webhook))
    )


def _row(db: Database, delivery_id: int) -> Row:
    found = list(_query().where(Delivery.delivery_id == delivery_id).dicts().bind(db).execute())
    if not found:
        raise NotFound("Delivery not found")
    return dict(found[0])


def _move(db: Database, row: Row, **values: Any) -> None:
    """Change a delivery if it still is as it was read."""
    same = [Delivery.delivery_id == row["delivery_id"], Delivery.status == row["status"]]
    same += [Delivery.attempts == row["attempts"], Delivery.leased == row["leased"]]
    due = row["next_attempt_at"]
    same.append(Delivery.next_attempt_at.is_null() if due is None else Delivery.next_attempt_at == due)
    changed = Delivery.update(values).where(*same).execute(db)
    if not changed:
        raise Conflict("this delivery has just changed: look again")


def _is_under_way(row: Row, now: datetime) -> bool:
    until = row["open_at"] if lanes.is_in_order(row["next_attempt_at"]) else row["next_attempt_at"]
    return bool(row["status"] == Status.PENDING and row["leased"] and until is not None and until > now)


def _shown(db: Database, row: Row) -> Row:
    waiting_for, until = _waiting(db, row)
    return {
        "delivery_id": row["delivery_id"],
        "webhook_id": row["webhook_id"],
        "event_id": row["event_id"],
        "event_type": row["event_type"],
        "status": row["status"],
        "attempts": row["attempts"],
        "next_attempt_at": until,
        "waiting_for": waiting_for,
        "reason": row["reason"] or row["last_error"] if row["status"] in (Status.FAILED, Status.CANCELLED) else None,
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
    }


def _waiting(db: Database, row: Row) -> tuple[str | None, datetime | None]:
    """What a delivery waits for, and until when."""
    now = clock.now()
    due, opens = row["next_attempt_at"], row["open_at"]
    if row["status"] != Status.PENDING:
        return None, None
    if not row["enabled"]:
        return "nothing: its webhook is disabled, it is about to be cancelled", None
    if _is_under_way(row, now):
        return "nothing: it is being made right now", None
    if row["ordered"] and _is_behind_another(db, row):
        return "order: the delivery before it has not ended", None
    if opens is not None and opens > now:
        until = max(opens, due)
        return ("back-off: the endpoint fails" if row["failures"] else "rate limit"), until
    if due > now:
        return "back-off: its next attempt", due
    return "its turn", max(due, row["created_at"])


def _is_behind_another(db: Database, row: Row) -> bool:
    waiting = Delivery.select(Delivery.delivery_id)
    waiting = waiting.where(Delivery.webhook == row["webhook_id"], Delivery.status == Status.PENDING)
    first = waiting.order_by(Delivery.next_attempt_at, Delivery.delivery_id).limit(1)  # as they are claimed
    return bool(first.scalar(db) != row["delivery_id"])


def _attempt(number: int, found: Mapping[str, Any]) -> Row:
    names: Sequence[str] = ("started_at", "duration_ms", "status_code", "error", "response")
    return {"number": number, **{name: found[name] for name in names}}


def restart(db: Database, delivery_ids: Sequence[int], statuses: Iterable[str], due: str) -> list[int]:
    """Make these due then, from the start of their schedule, if they have one of these statuses; returns their ids.

    Inside a unit of work.
    """
    if not delivery_ids:
        return []
    allowed = ", ".join(f"'{Status(one)}'" for one in statuses)
    statement = f"""
        UPDATE deliveries SET status = 'pending', leased = FALSE, finished_at = NULL, attempts_before = attempts,
               reason = NULL, next_attempt_at = {sql.moment(db)}
        WHERE delivery_id IN (SELECT id FROM {sql.rows(db, "id bigint")}) AND status IN ({allowed})
        RETURNING delivery_id"""
    return [row[0] for row in db.execute_sql(statement, (due, sql.ids(delivery_ids))).fetchall()]


def oldest_due(db: Database) -> float:
    """For how many seconds the delivery has been due that has waited longest in a due lane; 0 if none is.

    Looks at the lanes that have been due for longest. Raises Unavailable.
    """
    now = clock.now()
    first = f"""
        SELECT CASE WHEN {lanes.in_order_sql("d")} THEN d.created_at ELSE d.next_attempt_at END FROM deliveries d
        WHERE d.webhook_id = l.webhook_id AND d.status = 'pending' ORDER BY d.next_attempt_at LIMIT 1"""
    moment = sql.moment(db)
    statement = f"""
        SELECT min(({first})) FROM (
            SELECT webhook_id FROM lanes WHERE due_at <= {moment} ORDER BY due_at LIMIT {DUE_LANES}) AS l"""
    with connected(db):
        oldest = read_time(db.execute_sql(statement, (stored_time(now),)).fetchone()[0])
    return max((now - oldest).total_seconds(), 0.0) if oldest is not None else 0.0
