"""What a webhook missed: looked for outside the writer, in short steps, and counted only so far.

An event is missed if it matches and the webhook has no delivery of it, or if its delivery failed or was cancelled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from peewee import Database

from hookline import clock, events
from hookline.errors import NotFound
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
Position = tuple[str, str]  # the time and id of an event


class Window(NamedTuple):
    """What a stretch of events holds for a webhook, in their order; and where the next begins, if any."""

    missing: list[str]  # events that match, of which it has no delivery
    ended: list[int]  # deliveries that ended as the replay wants
    after: Position | None


def count(db: Database, webhook_id: str, since: datetime, until: datetime | None = None, status: str = "failed") -> Row:
    """How many deliveries a replay would make due: `deliveries`, and with `more` perhaps more than that.

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
    """What a webhook missed since it began to fail or was disabled: `since`, for a replay, and the count of that.

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
            WHERE webhook_id = {db.param} AND delivery_id <= {db.param}
            ORDER BY delivery_id DESC LIMIT {LOOKED_BACK}) AS d
        WHERE d.status IN ('failed', 'cancelled') AND d.finished_at >= {sql.moment(db)}"""
    newest = _last_made_before(db, webhook_id, began)
    first = read_time(db.execute_sql(statement, (webhook_id, newest, stored_time(began))).fetchone()[0])
    return began if first is None else min(first, began)


def _last_made_before(db: Database, webhook_id: str, moment: datetime) -> int:
    """The id of the last delivery that a webhook had then, 0 if none: halves the ids, a seek each."""
    newest = f"SELECT max(delivery_id) FROM deliveries WHERE webhook_id = {db.param}"
    behind = f"""
        SELECT delivery_id, created_at FROM deliveries WHERE webhook_id = {db.param} AND delivery_id > {db.param}
        ORDER BY delivery_id LIMIT 1"""
    low, high = 0, int(db.execute_sql(newest, (webhook_id,)).fetchone()[0] or 0)
    while low < high:
        middle = (low + high) // 2
        row = db.execute_sql(behind, (webhook_id, middle)).fetchone()
        created_at = None if row is None else read_time(row[1])
        if created_at is not None and created_at < moment:
            low = int(row[0])
        else:
            high = middle
    return low


def look(db: Database, webhook: Row, statuses: Iterable[str], after: Position, until: datetime) -> Window:
    """What the next WINDOW events behind a position, from before `until`, hold for this webhook."""
    moment = sql.moment(db)
    statement = f"""
        SELECT created_at, event_id, event_type FROM events
        WHERE (created_at, event_id) > ({moment}, {db.param}) AND created_at < {moment}
        ORDER BY created_at, event_id LIMIT {WINDOW}"""
    found = db.execute_sql(statement, (*after, stored_time(until))).fetchall()
    made = _made(db, webhook["webhook_id"], [event_id for _, event_id, _ in found])
    ended = [made[event_id][0] for _, event_id, _ in found if event_id in made and made[event_id][1] in statuses]
    wanted = frozenset(json.loads(webhook["events"]))
    missing = {
        event_id: kind
        for _, event_id, kind in found
        if event_id not in made
        and not event_id.startswith(events.TEST_ID)
        and wanted & set(events.subscriptions_to(kind))
    }
    last = read_time(found[-1][0]) if len(found) == WINDOW else None
    behind = None if last is None else (stored_time(last), found[-1][1])
    return Window(_addressed(db, webhook, missing), ended, behind)


def _made(db: Database, webhook_id: str, event_ids: Sequence[str]) -> dict[str, tuple[int, str]]:
    """The delivery and status that a webhook has of each of these events, where it has one: a seek each."""
    given, condition = sql.rows(db, "id"), f"d.event_id = given.id AND d.webhook_id = {db.param}"
    columns = "d.event_id, d.delivery_id, d.status"
    statement = f"SELECT {columns} {sql.each(db, given, 'deliveries d', columns, condition, alias='d')}"
    rows = db.execute_sql(statement, (sql.ids(event_ids), webhook_id)).fetchall()
    return {event_id: (delivery_id, status) for event_id, delivery_id, status in rows}


def _addressed(db: Database, webhook: Row, kinds: dict[str, str]) -> list[str]:
    """Of these events, given with their types, those whose data does not speak against this webhook."""
    team, named = webhook["team"] or "", FORMERLY in json.loads(webhook["events"])
    ours = (events.OWN, FORMERLY)
    doubtful = [event_id for event_id, kind in kinds.items() if team or kind.startswith(ours)]
    refused: set[str] = set()
    select = f"SELECT event_id, payload FROM events WHERE event_id IN (SELECT id FROM {sql.rows(db, 'id')})"
    for at in range(0, len(doubtful), PAYLOADS_AT_ONCE):
        for event_id, payload in db.execute_sql(select, (sql.ids(doubtful[at : at + PAYLOADS_AT_ONCE]),)).fetchall():
            data = json.loads(payload)
            is_about_it = events.is_about(webhook["webhook_id"], kinds[event_id], data)
            is_former = kinds[event_id] == FORMERLY and set(data) == FORMER_FIELDS
            if is_about_it or (is_former and not named) or (team and team not in events.teams_of(data)):
                refused.add(event_id)
    return [event_id for event_id in kinds if event_id not in refused]


def webhook_of(db: Database, webhook_id: str) -> Row:
    columns = (Webhook.webhook_id, Webhook.events, Webhook.team, Webhook.enabled)
    found = list(Webhook.select(*columns).where(Webhook.webhook_id == webhook_id).dicts().bind(db).execute())
    if not found:
        raise NotFound("Webhook not found")
    return dict(found[0])
