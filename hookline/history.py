"""What happened to events: their list, why a webhook got one or did not, and replaying what a webhook missed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from peewee import Database, Tuple, fn

from hookline import clock, deliveries, events, sql
from hookline.database import connected, transaction
from hookline.errors import Conflict, NotFound
from models import IN_ORDER, Delivery, Event, Status, Webhook, read_time, stored_time

PAYLOADS_AT_ONCE = 200  # each has up to MAX_PAYLOAD
UNDELIVERED = (Status.FAILED, Status.CANCELLED)

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

    Reasons: `matched`, `disabled`, `not subscribed`, `another team`, `a test of another webhook`, or `changed since`
    where it would match today.
    """
    with connected(db):
        event = _event(db, event_id)
        teams = events.teams_of(json.loads(event["payload"]))
        query = Webhook.select().where(Webhook.webhook_id > after).order_by(Webhook.webhook_id).limit(limit)
        webhooks = list(query.dicts().bind(db).execute())
        ids = [webhook["webhook_id"] for webhook in webhooks]
        made = Delivery.select(Delivery.webhook, Delivery.delivery_id, Delivery.status)
        made = made.where(Delivery.event == event_id, Delivery.webhook.in_(ids)).tuples().bind(db)
        found = {webhook_id: (delivery_id, status) for webhook_id, delivery_id, status in made.execute()}
    return [_explained(webhook, event, teams, found.get(webhook["webhook_id"])) for webhook in webhooks]


def _explained(webhook: Row, event: Row, teams: Sequence[str], made: tuple[int, str] | None) -> Row:
    shown: Row = {"webhook_id": webhook["webhook_id"], "matched": made is not None, "reason": "matched"}
    if made is not None:
        return {**shown, "delivery_id": made[0], "status": made[1]}
    if event["event_id"].startswith(events.TEST_ID):
        shown["reason"] = "a test of another webhook"
    elif not webhook["enabled"]:
        shown["reason"] = "disabled"
    elif not {event["event_type"], "*"} & set(json.loads(webhook["events"])):
        shown["reason"] = "not subscribed"
    elif (webhook["team"] or "") not in teams:
        shown["reason"] = "another team"
    else:
        shown["reason"] = "changed since: it would match today"
    return {**shown, "delivery_id": None, "status": None}


def replay(
    db: Database,
    webhook_id: str,
    since: datetime,
    until: datetime | None = None,
    *,
    everything: bool = False,
    dry_run: bool = False,
) -> int:
    """Deliver again what a webhook did not get of the events from `since` on (before `until`); returns how many.

    That is what failed, was cancelled, or was published while it was disabled. With `everything` also what it did get.
    A dry run counts and changes nothing. Raises NotFound, Conflict (it is disabled), Unavailable.
    """
    statuses = [*UNDELIVERED, Status.SUCCEEDED] if everything else list(UNDELIVERED)
    if dry_run:
        with connected(db):
            webhook = _webhook(db, webhook_id)
            return deliveries.count(db, webhook_id, since, until, statuses) + len(_missed(db, webhook, since, until))
    with transaction(db):
        webhook = _webhook(db, webhook_id)
        if not webhook["enabled"]:
            raise Conflict("the webhook is disabled: enable it first")
        missed = _missed(db, webhook, since, until)
        made = deliveries.restart(db, webhook_id, since, until, statuses) + _deliver(db, webhook, missed)
        if made:
            condition = "webhook_id IN (SELECT id FROM {given}) AND status = 'pending'"
            events.queue(db, condition, sql.ids([webhook_id]), open_now=True)
        return made


def first_missed(db: Database, webhook_id: str, began: datetime) -> datetime:
    """The time of the first event whose delivery ended undelivered from `began` on, at the latest `began` itself."""
    query = Event.select(fn.MIN(Event.created_at)).join(Delivery, on=(Delivery.event == Event.event_id))
    lost = query.where(Delivery.webhook == webhook_id, Delivery.status.in_(UNDELIVERED), Delivery.finished_at >= began)
    first = read_time(lost.scalar(db))
    return began if first is None else min(first, began)


def _missed(db: Database, webhook: Row, since: datetime, until: datetime | None) -> list[str]:
    """The events that match the webhook and of which it has no delivery, oldest first."""
    wanted = set(json.loads(webhook["events"]))
    made = Delivery.select(1).where(Delivery.event == Event.event_id, Delivery.webhook == webhook["webhook_id"])
    query = Event.select(Event.event_id, Event.payload, Event.created_at)
    query = query.where(Event.created_at >= since, ~fn.EXISTS(made))
    if until is not None:
        query = query.where(Event.created_at < until)
    if "*" not in wanted:
        query = query.where(Event.event_type.in_(sorted(wanted)))
    query = query.where(Event.event_type != events.TEST_EVENT)
    query = query.where(fn.SUBSTR(Event.event_id, 1, len(events.TEST_ID)) != events.TEST_ID)
    query = query.order_by(Event.created_at, Event.event_id).limit(PAYLOADS_AT_ONCE)
    team, found, rest = webhook["team"] or "", list[str](), query
    while True:
        rows = list(rest.tuples().bind(db).execute())
        found += [event_id for event_id, payload, _ in rows if not team or team in events.teams_of(json.loads(payload))]
        if len(rows) < PAYLOADS_AT_ONCE:
            return found
        last = Tuple(stored_time(rows[-1][2]), rows[-1][0])
        rest = query.where(Tuple(Event.created_at, Event.event_id) > last)


def _deliver(db: Database, webhook: Mapping[str, Any], event_ids: Sequence[str]) -> int:
    """Insert deliveries of these events, unless another replay just has; returns how many."""
    if not event_ids:
        return 0
    now = stored_time(clock.now())
    due = IN_ORDER if webhook["ordered"] else now
    moment = sql.moment(db)
    statement = f"""
        INSERT INTO deliveries (webhook_id, event_id, leased, next_attempt_at, created_at)
        SELECT {db.param}, id, FALSE, {moment}, {moment} FROM {sql.rows(db, "id")} WHERE TRUE
        ON CONFLICT (event_id, webhook_id) DO NOTHING"""
    return int(db.execute_sql(statement, (webhook["webhook_id"], due, now, sql.ids(event_ids))).rowcount)


def _event(db: Database, event_id: str) -> Row:
    found = list(Event.select().where(Event.event_id == event_id).dicts().bind(db).execute())
    if not found:
        raise NotFound("Event not found")
    return dict(found[0])


def _webhook(db: Database, webhook_id: str) -> Row:
    found = list(Webhook.select().where(Webhook.webhook_id == webhook_id).dicts().bind(db).execute())
    if not found:
        raise NotFound("Webhook not found")
    return dict(found[0])
