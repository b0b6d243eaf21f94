"""Missed events of a webhook: found outside the writer, in short steps, and counted up to a limit.

An event is missed if it matches and the webhook has no delivery of it, or if its delivery failed or was cancelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, events, history
from hookline.errors import NotFound
from hookline.history import Position
from hookline.store import sql
from hookline.tables import Status, Webhook, read_time, stored_time

WINDOW = 500  # events looked at in one go
MOST_COUNTED = 10_000  # deliveries
WINDOWS_COUNTED = 200  # 100,000 events: counting ends here, too
LOOKED_BACK = 100_000  # deliveries from before an endpoint began to fail that are looked at
PAYLOADS_AT_ONCE = 200  # each has up to MAX_PAYLOAD
UNDELIVERED = (Status.FAILED, Status.CANCELLED)
WANTED = {"failed": UNDELIVERED, "all": (*UNDELIVERED, Status.SUCCEEDED)}
FORMERLY = "webhook.disabled"  # what releases before `hookline.*` published, and `*` got: it names others' webhooks
FORMER_FIELDS = {"webhook_id", "reason", "event_type", "timestamp"}  # of its payload

Row = dict[str, Any]


class Made(NamedTuple):
    """A delivery that a webhook has of an event."""

    event_id: str
    delivery_id: int
    status: str


class Window(NamedTuple):
    """The events and deliveries for a replay in a stretch of events, in order; and where the next begins, if any."""

    missing: list[str]  # events that match, of which the webhook has no delivery
    ended: list[int]  # deliveries that ended in one of the wanted statuses
    after: Position | None


def count(db: Database, webhook_id: str, since: datetime, until: datetime | None = None, status: str = "failed") -> Row:
    """How many deliveries a replay would make due: `deliveries`; there may be more than that if `more` is true.

    Counts to 10,000 deliveries or through 100,000 events, in short steps that hold no lock. Raises NotFound,
    Unavailable.
    """
    end, counted, more = min(until or clock.now(), clock.now()), 0, False
    after: Position | None = (stored_time(since), "")
    for _ in range(WINDOWS_COUNTED):
        if after is None or counted > MOST_COUNTED:
            break
        with sql.reading(db):
            window = look(db, webhook_of(db, webhook_id), WANTED[status], after, end)
        counted, after = counted + len(window.missing) + len(window.ended), window.after
    else:
        more = after is not None
    return {"deliveries": min(counted, MOST_COUNTED), "more": more or counted > MOST_COUNTED}


def since(db: Database, webhook_id: str, began: datetime) -> Row:
    """Count what a webhook missed since it began to fail or was disabled; `since` is where a replay should begin.

    Raises NotFound, Unavailable.
    """
    with sql.reading(db):
        first = _first_missed(db, webhook_id, began)
    return {"since": first, **count(db, webhook_id, first)}


def _first_missed(db: Database, webhook_id: str, began: datetime) -> datetime:
    """The time of the first event whose delivery ended undelivered from `began` on, at the latest `began` itself."""
    statement = f"""
        SELECT min((SELECT e.created_at FROM events e WHERE e.event_id = d.event_id)) FROM (
            SELECT event_id, status, finished_at FROM deliveries
            WHERE webhook_id = {sql.param(db, "webhook_id")} AND delivery_id <= {sql.param(db, "newest")}
            ORDER BY delivery_id DESC LIMIT {LOOKED_BACK}) AS d
        WHERE d.status IN ('failed', 'cancelled') AND d.finished_at >= {sql.time(db, "began")}"""
    newest = _last_made_before(db, webhook_id, began)
    values = {"webhook_id": webhook_id, "newest": newest, "began": stored_time(began)}
    first = read_time(db.execute_sql(statement, values).fetchone()[0])
    return began if first is None else min(first, began)


def _last_made_before(db: Database, webhook_id: str, moment: datetime) -> int:
    """The id of the last delivery that a webhook had then, 0 if none: halves the ids, a seek each."""
    this = f"webhook_id = {sql.param(db, 'webhook_id')}"
    newest = f"SELECT max(delivery_id) FROM deliveries WHERE {this}"
    behind = f"""
        SELECT delivery_id, created_at FROM deliveries WHERE {this} AND delivery_id > {sql.param(db, "middle")}
        ORDER BY delivery_id LIMIT 1"""
    low, high = 0, int(db.execute_sql(newest, {"webhook_id": webhook_id}).fetchone()[0] or 0)
    while low < high:
        middle = (low + high) // 2
        row = db.execute_sql(behind, {"webhook_id": webhook_id, "middle": middle}).fetchone()
        delivery_id, created_at = row or (0, None)
        made_at = read_time(created_at)
        if made_at is not None and made_at < moment:
            low = int(delivery_id)
        else:
            high = middle
    return low


def look(db: Database, webhook: Row, statuses: Iterable[str], after: Position, until: datetime) -> Window:
    """Look for what this webhook missed in the next WINDOW events behind a position, from before `until`."""
    happened, following = history.window(db, after, until, WINDOW)
    made = _made(db, webhook["webhook_id"], [event.event_id for event in happened])
    subscribed = frozenset(json.loads(webhook["events"]))
    ended = []
    missing = {}
    for event in happened:
        if (delivery := made.get(event.event_id)) is not None:
            if delivery.status in statuses:
                ended.append(delivery.delivery_id)
        elif event.event_id.startswith(events.TEST_ID):
            continue
        elif subscribed & set(events.subscriptions_to(event.event_type)):
            missing[event.event_id] = event.event_type
    return Window(_addressed(db, webhook, missing), ended, following)


def _made(db: Database, webhook_id: str, event_ids: Sequence[str]) -> dict[str, Made]:
    """By event, the deliveries that a webhook has of these events: a seek each."""
    condition = f"d.event_id = event_ids.id AND d.webhook_id = {sql.param(db, 'webhook_id')}"
    columns = "d.event_id, d.delivery_id, d.status"
    made = sql.each(db, sql.values(db, "event_ids", "id"), "deliveries d", columns, condition, alias="d")
    values = {"event_ids": sql.encoded_ids(event_ids), "webhook_id": webhook_id}
    rows = db.execute_sql(f"SELECT {columns} {made}", values).fetchall()
    return {delivery.event_id: delivery for delivery in (Made(*row) for row in rows)}


def _addressed(db: Database, webhook: Row, types: dict[str, str]) -> list[str]:
    """Of these events (types by id) those whose data does not exclude this webhook: by its team, or as about it."""
    doubtful = [
        event_id for event_id, kind in types.items() if webhook["team"] or kind.startswith((events.OWN, FORMERLY))
    ]
    select = f"SELECT event_id, payload FROM events WHERE event_id IN (SELECT id FROM {sql.values(db, 'ids', 'id')})"
    excluded: set[str] = set()
    for start in range(0, len(doubtful), PAYLOADS_AT_ONCE):
        ids = sql.encoded_ids(doubtful[start : start + PAYLOADS_AT_ONCE])
        for event_id, payload in db.execute_sql(select, {"ids": ids}).fetchall():
            if not _is_addressed(webhook, types[event_id], json.loads(payload)):
                excluded.add(event_id)
    return [event_id for event_id in types if event_id not in excluded]


def _is_addressed(webhook: Row, event_type: str, data: Row) -> bool:
    if events.is_about(webhook["webhook_id"], event_type, data):
        return False
    if event_type == FORMERLY and set(data) == FORMER_FIELDS and FORMERLY not in json.loads(webhook["events"]):
        return False
    return not webhook["team"] or webhook["team"] in events.teams_of(data)


def webhook_of(db: Database, webhook_id: str) -> Row:
    """The columns of a webhook that `look` needs. Raises NotFound. On an open connection."""
    columns = (Webhook.webhook_id, Webhook.events, Webhook.team, Webhook.enabled)
    rows = list(Webhook.select(*columns).where(Webhook.webhook_id == webhook_id).dicts().bind(db).execute())
    if not rows:
        raise NotFound("Webhook not found")
    return dict(rows[0])
