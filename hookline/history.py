"""What happened to events: their list, and why a webhook got one or did not."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from peewee import Database, Tuple, fn

from hookline import events
from hookline.errors import NotFound
from hookline.store.units import connected
from hookline.tables import Delivery, Event, Status, Webhook, stored_time

Row = dict[str, Any]


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
    """For each webhook, by id: did it match the event, and if not, why. Raises NotFound, Unavailable.

    Reasons: `matched`, `disabled`, `not subscribed`, `about this webhook`, `another team`, `a test of another webhook`,
    or `changed since` where it would match today.
    """
    with connected(db):
        event = _event(db, event_id)
        data = json.loads(event["payload"])
        query = Webhook.select().where(Webhook.webhook_id > after).order_by(Webhook.webhook_id).limit(limit)
        webhooks = list(query.dicts().bind(db).execute())
        ids = [webhook["webhook_id"] for webhook in webhooks]
        made = Delivery.select(Delivery.webhook, Delivery.delivery_id, Delivery.status)
        made = made.where(Delivery.event == event_id, Delivery.webhook.in_(ids)).tuples().bind(db)
        found = {webhook_id: (delivery_id, status) for webhook_id, delivery_id, status in made.execute()}
    return [_explained(webhook, event, data, found.get(webhook["webhook_id"])) for webhook in webhooks]


def _explained(webhook: Row, event: Row, data: Row, made: tuple[int, str] | None) -> Row:
    shown: Row = {"webhook_id": webhook["webhook_id"], "matched": made is not None, "reason": "matched"}
    if made is not None:
        return {**shown, "delivery_id": made[0], "status": made[1]}
    if event["event_id"].startswith(events.TEST_ID):
        shown["reason"] = "a test of another webhook"
    elif not webhook["enabled"]:
        shown["reason"] = "disabled"
    elif not set(events.subscriptions_to(event["event_type"])) & set(json.loads(webhook["events"])):
        shown["reason"] = "not subscribed"
    elif events.is_about(webhook["webhook_id"], event["event_type"], data):
        shown["reason"] = "about this webhook"
    elif (webhook["team"] or "") not in events.teams_of(data):
        shown["reason"] = "another team"
    else:
        shown["reason"] = "changed since: it would match today"
    return {**shown, "delivery_id": None, "status": None}


def _event(db: Database, event_id: str) -> Row:
    found = list(Event.select().where(Event.event_id == event_id).dicts().bind(db).execute())
    if not found:
        raise NotFound("Event not found")
    return dict(found[0])
