"""History: the list of events, and why a webhook got one or did not."""

from __future__ import annotations

import json
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from peewee import Database, Tuple, fn

from hookline import events
from hookline.errors import NotFound
from hookline.store import sql
from hookline.store.units import connected
from hookline.tables import Delivery, Event, Status, Webhook, read_time, stored_time

Row = dict[str, Any]
Position = tuple[str, str]  # the time and id of an event, by which events are ordered


class Verdict(StrEnum):
    """Why a webhook has a delivery of an event, or has none."""

    MATCHED = "matched"
    TEST_OF_ANOTHER = "a test of another webhook"
    DISABLED = "disabled"
    NOT_SUBSCRIBED = "not subscribed"
    ABOUT_IT = "about this webhook"
    ANOTHER_TEAM = "another team"
    CHANGED_SINCE = "changed since: it would match today"


class Happened(NamedTuple):
    """An event in a window."""

    created_at: Any
    event_id: str
    event_type: str


def page(
    db: Database, *, event_type: str | None = None, limit: int = 50, before: tuple[datetime, str] | None = None
) -> list[Row]:
    """At most `limit` events, newest first, without their data. Raises Unavailable."""
    count = Delivery.select(fn.COUNT(1)).where(Delivery.event == Event.event_id)
    query = Event.select(Event.event_id, Event.event_type, Event.created_at, count.alias("deliveries"))
    query = query.order_by(Event.created_at.desc(), Event.event_id.desc()).limit(limit)
    if event_type is not None:
        query = query.where(Event.event_type == event_type)
    if before is not None:
        query = query.where(Tuple(Event.created_at, Event.event_id) < Tuple(stored_time(before[0]), before[1]))
    with connected(db):
        return list(query.dicts().bind(db).execute())


def get(db: Database, event_id: str) -> Row:
    """One event with its `data` as it is sent, and its deliveries by status. Raises NotFound, Unavailable."""
    with connected(db):
        event = _event(db, event_id)
        query = Delivery.select(Delivery.status, fn.COUNT(1)).where(Delivery.event == event_id)
        counts = dict(query.group_by(Delivery.status).tuples().bind(db).execute())
    shown = {name: event[name] for name in ("event_id", "event_type", "idempotency_key", "created_at")}
    statuses = {status.value: counts.get(status.value, 0) for status in Status}
    return {**shown, "data": json.loads(event["payload"]), "deliveries": statuses}


def explain(db: Database, event_id: str, *, limit: int = 50, after: str = "") -> list[Row]:
    """For each webhook, by id: did it match the event, and the `reason`, a Verdict. Raises NotFound, Unavailable."""
    with connected(db):
        event = _event(db, event_id)
        query = Webhook.select().where(Webhook.webhook_id > after).order_by(Webhook.webhook_id).limit(limit)
        webhooks = list(query.dicts().bind(db).execute())
        ids = [webhook["webhook_id"] for webhook in webhooks]
        made = Delivery.select(Delivery.webhook.alias("webhook_id"), Delivery.delivery_id, Delivery.status)
        made = made.where(Delivery.event == event_id, Delivery.webhook.in_(ids)).dicts().bind(db)
        deliveries = {delivery["webhook_id"]: delivery for delivery in made.execute()}
    data = json.loads(event["payload"])
    return [_explained(webhook, event, data, deliveries.get(webhook["webhook_id"])) for webhook in webhooks]


def window(db: Database, after: Position, until: datetime, limit: int) -> tuple[list[Happened], Position | None]:
    """The next `limit` events behind a position, from before `until`, oldest first; and where the next window begins.

    None if this is the last one. On an open connection.
    """
    statement = f"""
        SELECT created_at, event_id, event_type FROM events
        WHERE (created_at, event_id) > ({sql.time(db, "after")}, {sql.param(db, "after_id")})
              AND created_at < {sql.time(db, "until")}
        ORDER BY created_at, event_id LIMIT {limit}"""
    values = {"after": after[0], "after_id": after[1], "until": stored_time(until)}
    events = [Happened(*row) for row in db.execute_sql(statement, values).fetchall()]
    last = read_time(events[-1].created_at) if len(events) == limit else None
    return events, None if last is None else (stored_time(last), events[-1].event_id)


def _explained(webhook: Row, event: Row, data: Row, delivery: Row | None) -> Row:
    verdict = _why_not(webhook, event, data) if delivery is None else Verdict.MATCHED
    return {
        "webhook_id": webhook["webhook_id"],
        "matched": delivery is not None,
        "reason": verdict.value,
        "delivery_id": delivery and delivery["delivery_id"],
        "status": delivery and delivery["status"],
    }


def _why_not(webhook: Row, event: Row, data: Row) -> Verdict:
    if event["event_id"].startswith(events.TEST_ID):
        return Verdict.TEST_OF_ANOTHER
    if not webhook["enabled"]:
        return Verdict.DISABLED
    if not set(events.subscriptions_to(event["event_type"])) & set(json.loads(webhook["events"])):
        return Verdict.NOT_SUBSCRIBED
    if events.is_about(webhook["webhook_id"], event["event_type"], data):
        return Verdict.ABOUT_IT
    if (webhook["team"] or "") not in events.teams_of(data):
        return Verdict.ANOTHER_TEAM
    return Verdict.CHANGED_SINCE


def _event(db: Database, event_id: str) -> Row:
    rows = list(Event.select().where(Event.event_id == event_id).dicts().bind(db).execute())
    if not rows:
        raise NotFound("Event not found")
    return dict(rows[0])
